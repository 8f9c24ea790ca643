"""One stage's part of a publication: its tensors, chunk by chunk, to every engine.

Who waits for whom: a chunk is announced to all engines over HTTP and broadcast at once; while it travels and loads, the
next one is gathered from the trainer ranks; then the first one's acknowledgements are awaited before the next is
announced. One announcement at a time, because two that are on their way to an engine on different connections may
arrive in the other order, and the engine would read one chunk's bytes as the other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlx.config.schema import SyncConfig
from rlx.obs.log import logger
from rlx.rollout.weight_group import broadcast_from_trainer
from rlx.sync.chunks import chunks, flatten
from rlx.sync.errors import SyncError
from rlx.sync.fanout import describe, failures, start, unwell
from rlx.sync.group import GRACE_S, StageGroup
from rlx.sync.ledger import Ledger
from rlx.types import WeightChunk


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Flight:
    """A chunk on its way: the engines' answers and the broadcast, by who owes them. Keeps the buffers alive."""

    number: int
    chunk: WeightChunk
    buffers: tuple[Tensor, ...]
    pending: Mapping[str, Future[None]]


class StageSender:
    """Sends the tensors of one stage over its open group."""

    def __init__(self, opened: StageGroup, config: SyncConfig, device: torch.device) -> None:
        self._opened = opened
        self._config = config
        self._device = device

    def send(self, tensors: Iterator[tuple[str, Tensor]], ledger: Ledger, version: int) -> None:
        """Deliver every tensor to every engine; returns when all have loaded all.

        The chunk that completes the engines' model carries the version and flushes the caches. Raises SyncError naming
        side, stage, phase and tensor. ``tensors`` is driven to its end in any case: its gathers are collective, and the
        stage's other ranks would wait for this one.
        """
        try:
            self._send(tensors, ledger, version)
        except Exception:
            self._drain(tensors)
            raise

    def _send(self, tensors: Iterator[tuple[str, Tensor]], ledger: Ledger, version: int) -> None:
        flight: _Flight | None = None
        stream = chunks(ledger.checked(tensors), self._config.bucket_bytes, self._config.flatten_below_bytes)
        number = 0
        while True:
            try:
                chunk = next(stream, None)
            except SyncError as error:
                raise SyncError(f"trainer side, stage {self._opened.stage}, phase check: {error}") from error
            except Exception as error:
                raise SyncError(
                    f"trainer side, stage {self._opened.stage}, phase gather, {ledger.where}: {type(error).__name__}: {error}"
                ) from error
            if flight is not None:
                self._wait(flight)
            if chunk is None:
                return
            is_final = ledger.depart(len(chunk.infos))
            flight = self._launch(number, chunk, version if is_final else None)
            number += 1

    def _launch(self, number: int, chunk: WeightChunk, version: int | None) -> _Flight:
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
        pending["the sender"] = start(self._broadcast_call(buffers))
        return _Flight(number=number, chunk=chunk, buffers=buffers, pending=pending)

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

    def _wait(self, flight: _Flight) -> None:
        found = failures(flight.pending, self._config.timeout_s + GRACE_S)
        if not found:
            return
        engines = {who: error for who, error in found.items() if who != "the sender"}
        first, last = flight.chunk.infos[0].name, flight.chunk.infos[-1].name
        side = "engine" if engines else "trainer"
        raise SyncError(
            f"{side} side, stage {self._opened.stage}, phase broadcast, chunk {flight.number}"
            f" ({len(flight.chunk.infos)} tensors, {first} to {last}): {describe(engines or found)}",
            unwell(engines),
        ) from next(iter((engines or found).values()))

    def _drain(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        try:
            for _ in tensors:
                pass
        except Exception as error:  # the failure that led here is the one to report
            logger.warning("weight sync: gathering the rest after a failure failed as well: %s", error)
