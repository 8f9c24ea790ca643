"""One stage's part of a publication: its tensors, chunk by chunk, to every engine.

Who waits for whom: a chunk departs to all engines; while it travels and loads, the next one is gathered from the trainer
ranks; then the first one's acknowledgements are awaited before the next departs. One announcement at a time, because two
that are on their way to an engine on different connections may arrive in the other order, and the engine would read one
chunk's bytes as the other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rlx.config.schema import SyncConfig
from rlx.obs.log import logger
from rlx.sync.chunks import chunks
from rlx.sync.errors import SyncError
from rlx.sync.fanout import describe, failures, raised, unwell
from rlx.sync.group import GRACE_S
from rlx.sync.manifest import Ledger
from rlx.sync.transports.base import SENDER, Departure, Lane
from rlx.types.weights import WeightChunk


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Flight:
    """A chunk on its way."""

    number: int
    chunk: WeightChunk
    departure: Departure


class StageSender:
    """Sends the tensors of pipeline stage ``stage`` over ``lane``."""

    def __init__(self, lane: Lane, stage: int, config: SyncConfig) -> None:
        self._lane = lane
        self._stage = stage
        self._config = config

    def send(self, tensors: Iterator[tuple[str, Tensor]], ledger: Ledger, version: int, repeats: bool) -> None:
        """Deliver every tensor to every engine; returns when all have loaded all.

        The chunk that completes the engines' model carries the version and flushes the caches. Raises SyncError naming
        side, stage, phase and tensor. ``tensors`` is driven to its end in any case: its gathers are collective, and the
        stage's other ranks would wait for this one. ``repeats``: they are those of the last publication.
        """
        self._lane.begin(version, repeats)
        try:
            self._send(tensors, ledger, version)
        except Exception:
            drain(tensors)
            raise

    def _send(self, tensors: Iterator[tuple[str, Tensor]], ledger: Ledger, version: int) -> None:
        flight: _Flight | None = None
        flatten_below = self._lane.flatten_below_bytes(self._config.flatten_below_bytes)
        stream = chunks(ledger.checked(tensors), self._config.bucket_bytes, flatten_below)
        number = 0
        while True:
            try:
                chunk = next(stream, None)
            except SyncError as error:
                raise SyncError(f"trainer side, stage {self._stage}, phase check: {error}") from error
            except Exception as error:
                raise SyncError(
                    f"trainer side, stage {self._stage}, phase gather, {ledger.where}: {type(error).__name__}: {error}"
                ) from error
            if flight is not None:
                self._wait(flight)
                flight = None
                self._lane.arrived()
            if chunk is None:
                return
            is_final = ledger.depart(len(chunk.infos))
            flight = self._launch(number, chunk, version if is_final else None)
            number += 1

    def _launch(self, number: int, chunk: WeightChunk, version: int | None) -> _Flight:
        try:
            return _Flight(number=number, chunk=chunk, departure=self._lane.depart(chunk, version))
        except Exception as error:
            where = f"trainer side, stage {self._stage}, phase {self._lane.verb}, {_named(number, chunk)}"
            raise SyncError(f"{where}: {type(error).__name__}: {error}") from error

    def _wait(self, flight: _Flight) -> None:
        found = failures(flight.departure.pending, self._config.timeout_s + GRACE_S)
        if not found:
            return
        found |= raised(flight.departure.ongoing)
        engines = {who: error for who, error in found.items() if who != SENDER}
        # A SyncError is what engines told the sender over the group.
        side = "engine" if engines or isinstance(found[SENDER], SyncError) else "trainer"
        raise SyncError(
            f"{side} side, stage {self._stage}, phase {self._lane.verb}, {_named(flight.number, flight.chunk)}:"
            f" {describe(engines or found)}",
            unwell(engines),
        ) from next(iter((engines or found).values()))


def drain(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Drive a stage's tensors to their end after a failure, which is the one to report: the gathers are collective."""
    try:
        for _ in tensors:
            pass
    except Exception as error:
        logger.warning("weight sync: gathering the rest after a failure failed as well: %s", error)


def _named(number: int, chunk: WeightChunk) -> str:
    return f"chunk {number} ({len(chunk.infos)} tensors, {chunk.infos[0].name} to {chunk.infos[-1].name})"
