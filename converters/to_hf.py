"""Megatron checkpoint (converted, or from a training run) to a Hugging Face folder, file by file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from converters.export import Exporter
from converters.extents import write_all
from converters.journal import Output, check_free, fingerprint
from converters.plan import Parameter, batched, file_bytes, parameters
from converters.source import described_by
from converters.storage import StoredCheckpoint
from converters.verify import Difference, differences_of
from converters.work import Advance, run_all
from rlx.models.hf.companions import MANIFEST, Companions
from rlx.models.hf.files import (
    DTYPE_NAMES,
    INDEX,
    SINGLE,
    HfFiles,
    itemsize,
)

_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _HfFile:
    """One file to write: its header, and where each tensor starts."""

    name: str
    parameters: Sequence[Parameter]
    header: bytes
    starts: dict[str, int]
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to convert: ``against`` is a folder to compare with."""

    against: Path | None
    num_workers: int
    resume: bool


class ToHuggingFace:
    """One conversion. Construction checks everything that can be checked without reading weights (ValueError)."""

    def __init__(
        self, source: Path, companions: Companions, out: Path, options: Options, megatron: Callable[[], ModuleType]
    ) -> None:
        check_free(out)
        self._source, self._companions, self._out, self._options = source, companions, out, options
        self._against = None if options.against is None else HfFiles(options.against)
        if self._against is not None:
            _ = self._against.files  # broken or missing: say so before any work
        self._arch = described_by(companions.config)
        self._stored = StoredCheckpoint(source)
        places = megatron().skeleton(self._arch).places
        self._exporter = Exporter(self._stored, self._arch, places, _noted_dtypes(source))
        problems = list(self._exporter.problems())
        if problems:
            raise ValueError("\n".join(problems[:20]))
        self._files = self._plan()

    def run(self) -> list[Difference]:
        """Write; with ``against``, compare what was written before it is given its name. The differences found."""
        differences = []
        mark = fingerprint(self._source, self._arch)
        with Output(self._out, mark, resume=self._options.resume) as output:
            self._convert(output)
            if self._against is not None:
                differences = differences_of(HfFiles(output.folder), self._against, self._options.num_workers)
            if not differences:
                output.finish()
        return differences

    def _convert(self, output: Output) -> None:
        """Write what is not there yet, the index and the companions."""
        todo = [file for file in self._files if file.name not in output.done]
        total = sum(file.size for file in self._files)

        def write(file: _HfFile, advance: Advance) -> None:
            self._write(output.folder / file.name, file, advance)
            output.note(file.name, None)

        done = total - sum(file.size for file in todo)
        run_all("converting", todo, write, num_workers=self._options.num_workers, total_bytes=total, done_bytes=done)
        self._stored.close()
        if len(self._files) > 1:
            weight_map = {name: file.name for file in self._files for name in file.starts}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (output.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        self._companions.write(output.folder, HfFiles(output.folder).dtype)

    def _plan(self) -> list[_HfFile]:
        def size_of(parameter: Parameter) -> int:
            return sum(self._num_bytes(parameter).values())

        wanted = parameters(self._arch)
        batches = list(batched(wanted, size_of, file_bytes(sum(map(size_of, wanted)))))
        if len(batches) == 1:
            return [self._file(SINGLE, batches[0])]
        return [self._file(f"model-{i:05d}-of-{len(batches):05d}.safetensors", batch) for i, batch in enumerate(batches, start=1)]

    def _num_bytes(self, parameter: Parameter) -> dict[str, int]:
        named = zip(parameter.hf_names, parameter.hf_shapes, strict=True)
        return {name: math.prod(shape) * itemsize(self._exporter.dtype(name, parameter)) for name, shape in named}

    def _file(self, name: str, batch: Sequence[Parameter]) -> _HfFile:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position, starts = 0, {}
        for parameter in batch:
            sizes = self._num_bytes(parameter)
            for hf_name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True):
                stop = position + sizes[hf_name]
                dtype = _NAMES[self._exporter.dtype(hf_name, parameter)]
                entries[hf_name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, stop)}
                starts[hf_name] = position
                position = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        return _HfFile(name=name, parameters=batch, header=header, starts=starts, size=position)

    def _write(self, path: Path, file: _HfFile, advance: Advance) -> None:
        with path.open("wb") as stream:
            stream.write(file.header)
            stream.flush()
            for parameter in file.parameters:
                writes = self._exporter.writes(parameter)
                for name, write in (writes or {}).items():
                    advance(write(stream.fileno(), len(file.header) + file.starts[name]))
                for name, start, content in self._exporter.block_bytes(parameter) if writes is None else ():
                    advance(write_all(stream.fileno(), content, len(file.header) + file.starts[name] + start))


def _noted_dtypes(folder: Path) -> dict[str, str]:
    """What the converter noted of the tensors' own types; nothing for a checkpoint that it did not write."""
    manifest = folder / MANIFEST
    return dict(json.loads(manifest.read_text())["dtypes"]) if manifest.is_file() else {}
