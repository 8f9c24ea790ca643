"""The lane of engines on GPUs (or machines) of their own: a chunk is announced over HTTP and broadcast over the group."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from rlx.rollout.sglang.weight_group import broadcast_from_trainer
from rlx.sync.chunks import flatten
from rlx.sync.fanout import start
from rlx.sync.group import StageGroup, close_group
from rlx.sync.transports.base import SENDER, Departure
from rlx.types.weights import WeightChunk


class BroadcastLane:
    """Over one stage's open group."""

    verb = "broadcast"

    def __init__(self, opened: StageGroup, device: torch.device) -> None:
        self._opened = opened
        self._device = device

    def begin(self, version: int, repeats: bool) -> None:
        """Each chunk speaks for itself."""

    def flatten_below_bytes(self, configured: int) -> int:
        return configured

    def depart(self, chunk: WeightChunk, version: int | None) -> Departure:
        """Announce the chunk to all engines and broadcast it at once."""
        tensors = (flatten(chunk),) if chunk.flattened else tuple(tensor.detach() for tensor in chunk.tensors)
        buffers = tuple(tensor.to(self._device).contiguous() for tensor in tensors)
        pending = {
            engine.url: start(
                partial(
                    engine.control.update_weights,
                    chunk.infos,
                    self._opened.name,
                    flattened=chunk.flattened,
                    flush_cache=version is not None,
                    weight_version=None if version is None else str(version),
                )
            )
            for engine in self._opened.engines
        }
        pending[SENDER] = start(self._broadcast_call(buffers))
        return Departure(buffers=buffers, pending=pending)

    def arrived(self) -> None:
        """Nothing to give back: buffers are freed with their departure."""

    def close(self) -> None:
        close_group(self._opened)

    def _broadcast_call(self, buffers: tuple[Tensor, ...]) -> partial[None]:
        # In a thread: the first NCCL call of a group blocks until every peer is there, which a dead engine never is.
        # The thread works on the caller's stream, on which the buffers were filled.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        return partial(self._broadcast, buffers, stream)

    def _broadcast(self, buffers: tuple[Tensor, ...], stream: torch.cuda.Stream | None) -> None:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            works = [broadcast_from_trainer(buffer, self._opened.group) for buffer in buffers]
            for work in works:
                work.wait()
