"""The lane through a folder that trainers and engines both see, for engines out of reach of a group.

Every chunk becomes a safetensors file of ``PATH/incoming``. The sender whose chunk completes the model reads all headers back
(the other stages' too), adds the index and the small files of the model, gives the folder its name ``PATH/version-V``, and only
then tells the engines. What they read is thus whole or not there. Once all have loaded it, older versions go.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from rlx.models.hf.companions import Companions
from rlx.models.hf.files import INDEX, HfFiles, read_header
from rlx.obs.log import logger
from rlx.sync.errors import SyncError
from rlx.sync.fanout import start
from rlx.sync.group import Engine
from rlx.sync.transports.base import SENDER, Departure
from rlx.types.weights import WeightChunk

_POLL_S = 0.1
_TIDY_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncFolder:
    """Where versions are written, and what goes with the weights of each."""

    path: Path
    companions: Companions


class DiskLane:
    """From the sender of pipeline stage ``stage``; ``expected`` is the engines' model (Hugging Face name -> shape), ``limit_s``
    what the folder may take to take a chunk or to show the other stages' files."""

    def __init__(
        self, engines: tuple[Engine, ...], folder: SyncFolder, stage: int, expected: Mapping[str, tuple[int, ...]], limit_s: float
    ) -> None:
        self._engines, self._folder, self._stage = engines, folder, stage
        self._expected, self._limit_s = expected, limit_s
        self._incoming = folder.path / "incoming"
        self._numbers = count()
        self._loaded: Path | None = None
        self._closed = False
        self.verb = "write"
        if stage == 0:  # lanes open in the order of their stages: nobody writes yet
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._incoming.mkdir(parents=True)

    def begin(self, version: int, repeats: bool) -> None:
        """Each chunk speaks for itself."""

    def flatten_below_bytes(self, configured: int) -> int:
        """None: a file holds tensors as they are."""
        return 0

    def depart(self, chunk: WeightChunk, version: int | None) -> Departure:
        """Begin to write the chunk; the last one is written, and the folder checked and named, before this returns."""
        self.verb, self._loaded = "write", None
        tensors = {
            info.name: tensor.detach().to("cpu", copy=True).contiguous()
            for info, tensor in zip(chunk.infos, chunk.tensors, strict=True)
        }
        name = f"model-{self._stage:03d}-{next(self._numbers):05d}.safetensors"
        writing = start(partial(self._write, tensors, name))
        if version is None:
            return Departure(buffers=(), pending={SENDER: writing})
        try:
            writing.result(self._limit_s)
            folder = start(partial(self._complete, version)).result(2 * self._limit_s)
        except TimeoutError as error:
            raise SyncError(f"{self._folder.path} takes more than {self._limit_s:g} s to write or read back a chunk") from error
        self.verb, self._loaded = "load", folder
        pending = {
            engine.url: start(partial(engine.control.update_weights_from_disk, str(folder), str(version)))
            for engine in self._engines
        }
        return Departure(buffers=(), pending=pending)

    def arrived(self) -> None:
        """After the engines have loaded a version: older ones go."""
        if self._loaded is None:
            return
        try:
            start(partial(_keep_only, self._loaded)).result(_TIDY_LIMIT_S)
        except (OSError, TimeoutError) as error:  # the engines serve the version all the same
            logger.warning("weight sync: older versions below %s stay: %s: %s", self._folder.path, type(error).__name__, error)

    def close(self) -> None:
        """A write that comes late leaves nothing behind. The last version stays: engines name it as their model's folder."""
        self._closed = True

    def _write(self, tensors: dict[str, Tensor], name: str) -> None:
        self._incoming.mkdir(parents=True, exist_ok=True)
        draft = self._incoming / f"{name}.part"
        save_file(tensors, draft, metadata={"format": "pt"})
        if self._closed:
            draft.unlink()
        else:
            draft.rename(self._incoming / name)

    def _complete(self, version: int) -> Path:
        """Check what was written, and give it its name."""
        files = self._read_back()
        (self._incoming / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(sorted(files.items()))}, indent=1))
        self._folder.companions.write(self._incoming, HfFiles(self._incoming).dtype)
        target = self._folder.path / f"version-{version}"
        shutil.rmtree(target, ignore_errors=True)
        self._incoming.rename(target)
        return target

    def _read_back(self) -> dict[str, str]:
        """The file of each tensor, once the folder holds the whole model: what other nodes write may show late here."""
        deadline = time.monotonic() + self._limit_s
        while True:
            files, problem = _inventory(self._incoming, self._expected)
            if problem is None:
                return files
            if time.monotonic() > deadline:
                raise SyncError(f"{self._incoming} is not the model that was sent, after {self._limit_s:g} s: {problem}")
            time.sleep(_POLL_S)


def _inventory(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], str | None]:
    """Tensor name to file of what is in the folder, and what is wrong with it. A file whose bytes do not fit its header is."""
    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            header = read_header(path)
        except (ValueError, OSError) as error:
            return files, str(error)
        for name, stored in header.items():
            if name in files:
                return files, f"{name} is in {files[name]} and in {path.name}"
            if stored.shape != tuple(expected.get(name, ())):
                return files, f"{name} in {path.name} has shape {list(stored.shape)}"
            files[name] = path.name
    missing = [name for name in expected if name not in files]
    return files, f"{len(missing)} tensors are missing, {missing[0]} first" if missing else None


def _keep_only(kept: Path) -> None:
    for folder in kept.parent.glob("version-*"):
        if folder != kept:
            shutil.rmtree(folder)
