"""How chunks get from a stage's sender to the engines: what every transport offers to ``rlx.sync.sender``."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from rlx.types.weights import WeightChunk

# Who owes the trainer's own part, among the engines' urls in ``Departure.pending``.
SENDER = "the sender"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Departure:
    """A chunk under way: what must stay alive meanwhile, and who still owes an answer.

    ``ongoing``: requests that go on beyond this chunk; one that fails explains why this chunk failed.
    """

    buffers: tuple[Tensor, ...]
    pending: Mapping[str, Future[None]]
    ongoing: Mapping[str, Future[None]] = field(default_factory=dict)


class Lane(Protocol):
    """``verb`` names the phase in which a chunk is under way."""

    @property
    def verb(self) -> str: ...

    def begin(self, version: int, repeats: bool) -> None:
        """A publication starts. ``repeats``: it is of the tensors of the last one."""

    def flatten_below_bytes(self, configured: int) -> int:
        """Tensors smaller than this travel in one buffer."""

    def depart(self, chunk: WeightChunk, version: int | None) -> Departure:
        """Send the chunk to all engines; returns at once. ``version`` with the last chunk only: it also flushes caches."""

    def arrived(self) -> None:
        """Every engine has loaded a departed chunk, and its buffers are gone."""

    def close(self) -> None: ...
