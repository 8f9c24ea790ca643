"""The order in which rows are dealt: a seeded shuffle an epoch, or by level; resumable from three integers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """The first ``num_epochs`` go from the lowest of ``levels`` (one a row) to the highest."""

    levels: Sequence[float]
    num_epochs: int


class EpochOrder:
    """Deals the numbers 0 .. ``num_rows`` - 1, all of them each epoch. The order depends on (``seed``, epoch) alone.

    An epoch is a seeded shuffle, or as the rows stand; an epoch of the curriculum is that, sorted by level: rows of one level
    keep that order among themselves.
    """

    def __init__(self, num_rows: int, *, seed: int | str, shuffle: bool, curriculum: Curriculum | None = None) -> None:
        assert num_rows > 0, "an order of no rows never ends"
        self._num_rows, self._seed, self._shuffle, self._curriculum = num_rows, seed, shuffle, curriculum
        self._epoch = self._offset = 0
        self._order = self._order_of_epoch()

    @property
    def epochs(self) -> float:
        """Epochs dealt so far, the present one's share included."""
        return self._epoch + self._offset / self._num_rows

    def next(self, num: int) -> list[int]:
        """The next ``num`` row numbers; goes over into the next epoch as often as needed."""
        return [self._draw() for _ in range(num)]

    def state(self) -> dict[str, int]:
        """What ``load_state`` needs to go on exactly here (JSON-able)."""
        return {"epoch": self._epoch, "offset": self._offset, "num_rows": self._num_rows}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken; ValueError when there is another number of rows now."""
        if state["num_rows"] != self._num_rows:
            raise ValueError(f"{self._num_rows} usable rows, but {state['num_rows']} when the state was saved")
        self._epoch, self._offset = state["epoch"], state["offset"]
        self._order = self._order_of_epoch()

    def _draw(self) -> int:
        if self._offset == self._num_rows:
            self._epoch, self._offset = self._epoch + 1, 0
            self._order = self._order_of_epoch()
        self._offset += 1
        return self._order[self._offset - 1]

    def _order_of_epoch(self) -> list[int]:
        order = list(range(self._num_rows))
        if self._shuffle:
            random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        if self._curriculum is not None and self._epoch < self._curriculum.num_epochs:
            levels = self._curriculum.levels
            order.sort(key=lambda row: levels[row])
        return order
