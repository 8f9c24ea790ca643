"""The lane of engines on the sender's machine: they open segments of host memory that it shares.

Every chunk is one flat buffer of its own that nobody writes to again: torch keeps it until the engine, which waits for its copies
first, has let go of it.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from functools import partial

from torch import Tensor

from rlx.rollout.sglang.segments import SHARED_MEMORY
from rlx.rollout.sglang.shared_tensors import LOAD_FORMAT, in_shared_memory, share_bucket
from rlx.sync.chunks import flatten
from rlx.sync.errors import SyncError
from rlx.sync.fanout import start
from rlx.sync.group import Engine
from rlx.sync.transports.base import Departure
from rlx.types.weights import WeightChunk


class SharedMemoryLane:
    """From one stage's sender to ``engines``, all on its machine."""

    verb = "load"

    def __init__(self, engines: tuple[Engine, ...]) -> None:
        self._engines = engines

    def begin(self, version: int, repeats: bool) -> None:
        """Each chunk speaks for itself."""

    def flatten_below_bytes(self, configured: int) -> int:
        """All of them: one buffer is one handle to open."""
        return 2**62

    def depart(self, chunk: WeightChunk, version: int | None) -> Departure:
        """Copy the chunk into a fresh buffer and tell all engines where it is."""
        _check_room(chunk)
        buffer = in_shared_memory(flatten(chunk).cpu())
        pending = {engine.url: self._tell(engine, chunk, buffer, version) for engine in self._engines}
        return Departure(buffers=(buffer,), pending=pending)

    def arrived(self) -> None:
        """Torch frees what readers let go of."""

    def close(self) -> None:
        """Nothing is held between publications."""

    def _tell(self, engine: Engine, chunk: WeightChunk, buffer: Tensor, version: int | None) -> Future[None]:
        texts = [share_bucket(buffer, chunk.infos) for _ in range(engine.endpoint.tp)]
        return start(
            partial(
                engine.control.update_weights_from_tensor,
                texts,
                load_format=LOAD_FORMAT,
                flush_cache=version is not None,
                weight_version=None if version is None else str(version),
            )
        )


def _check_room(chunk: WeightChunk) -> None:
    """Writing beyond the end of a full shared-memory file system ends the process without a word."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    if chunk.num_bytes > free:
        raise SyncError(
            f"{SHARED_MEMORY} has {free} bytes left, a chunk needs {chunk.num_bytes}; lower sync.bucket_bytes or enlarge it"
        )
