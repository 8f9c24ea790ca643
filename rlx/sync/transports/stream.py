"""The lane of engines that have rlx's receiver (``rlx.rollout.sglang.receiver``): one request a publication, bytes at wire speed.

The first publication announces every chunk in a request of its own, and both sides remember them. From the second on one request
opens the stream, while the first chunk is gathered: all engines take the same chunks again, in the same order, without further
words. A publication of other tensors (what never changes is left out after the first) begins anew. Who waits for whom: a chunk is
flattened once the one before the last has left, and leaves when the last one has; so two buffers exist at once. At the end every
engine rank says how it went. Caches are flushed by the publisher, not by these requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from rlx.rollout.sglang.receiver.group import answers
from rlx.rollout.sglang.shared_tensors import RECEIVER, receiver_text
from rlx.rollout.sglang.weight_group import broadcast_from_trainer
from rlx.sync.chunks import flatten
from rlx.sync.errors import SyncError
from rlx.sync.fanout import finished, start
from rlx.sync.group import StageGroup, close_group, rank_offsets
from rlx.sync.transports.base import SENDER, Departure
from rlx.types.weights import TensorInfo, WeightChunk


class StreamLane:
    """Over one stage's open group. A lane lives as long as its group, and so does what both sides remember."""

    verb = "stream"

    def __init__(self, opened: StageGroup, device: torch.device) -> None:
        self._opened = opened
        self._device = device
        self._books: list[tuple[TensorInfo, ...]] = []
        self._completes = False  # whether this stage's last chunk completes the engines' model
        self._is_known = False
        self._version = 0
        self._number = 0
        self._asked: Mapping[str, Future[None]] = {}
        self._leaving: tuple[dist.Work, Tensor] | None = None

    def begin(self, version: int, repeats: bool) -> None:
        """A publication starts. One that repeats sends what the last one sent; any other begins new books on both sides."""
        if not repeats:
            self._books.clear()
        self._is_known = bool(self._books)
        self._version, self._number = version, 0
        if self._is_known:
            self._ask({"group": self._opened.name, "stream": len(self._books)}, completes=self._completes)

    def flatten_below_bytes(self, configured: int) -> int:
        """All of them: a chunk is a stretch of bytes."""
        return 2**62

    def depart(self, chunk: WeightChunk, version: int | None) -> Departure:
        """Send the chunk; announce it if it is new."""
        number, self._number = self._number, self._number + 1
        is_last = True
        if not self._is_known:
            self._books.append(chunk.infos)
            self._completes = version is not None
            rows = [[info.name, info.dtype, list(info.shape)] for info in chunk.infos]
            request = {"group": self._opened.name, "bucket": rows, "number": number}
            self._ask(request, completes=version is not None)
        else:
            self._check(number, chunk)
            is_last = number + 1 == len(self._books)
        buffer = self._flat(chunk)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        send = partial(self._send, buffer, is_last, stream)
        # The last one waits for the engines, in a thread. So does a group's first NCCL call, until every peer is there. Others go
        # from here: a thread would wait for its turn while the next chunk is gathered.
        sending = start(send) if is_last else finished(send)
        if is_last:
            return Departure(buffers=(buffer,), pending={**self._asked, SENDER: sending})
        return Departure(buffers=(buffer,), pending={SENDER: sending}, ongoing=self._asked)

    def arrived(self) -> None:
        """Nothing to give back: buffers are freed when the next chunk leaves."""

    def close(self) -> None:
        self._leaving = None
        close_group(self._opened)

    def _check(self, number: int, chunk: WeightChunk) -> None:
        if number >= len(self._books) or self._books[number] != chunk.infos:
            raise SyncError(f"chunk {number} holds other tensors than in the publication before")

    def _ask(self, request: dict[str, object], *, completes: bool) -> None:
        text = receiver_text(request)
        self._asked = {
            engine.url: start(
                partial(
                    engine.control.update_weights_from_tensor,
                    [text] * engine.endpoint.tp,
                    load_format=RECEIVER,
                    flush_cache=False,
                    weight_version=str(self._version) if completes else None,
                )
            )
            for engine in self._opened.engines
        }

    def _flat(self, chunk: WeightChunk) -> Tensor:
        """The chunk's bytes; of a single tensor that has them in a row its own."""
        first = chunk.tensors[0].detach()
        if len(chunk.tensors) == 1 and first.is_contiguous() and first.device == self._device:
            return first.view(-1).view(torch.uint8)
        return flatten(chunk).to(self._device)

    def _send(self, buffer: Tensor, is_last: bool, stream: torch.cuda.Stream | None) -> None:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            work = broadcast_from_trainer(buffer, self._opened.group)
            before, self._leaving = self._leaving, (work, buffer)
            if before is not None:
                before[0].wait()
            if is_last:
                self._leaving = None
                work.wait()
                self._hear()

    def _hear(self) -> None:
        """Raise what an engine rank says went wrong."""
        said = answers(self._opened.group, self._device)
        endpoints = [engine.endpoint for engine in self._opened.engines]
        problems = [
            f"{endpoint.url}, rank {rank}: {said[offset + rank]}"
            for endpoint, offset in zip(endpoints, rank_offsets(endpoints), strict=True)
            for rank in range(endpoint.tp)
            if said[offset + rank]
        ]
        if problems:
            raise SyncError("; ".join(problems))
