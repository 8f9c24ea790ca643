"""The order in which rows are dealt: a seeded shuffle an epoch, resumable from three integers."""

from __future__ import annotations

import random
from collections.abc import Mapping


class EpochOrder:
    """Deals the numbers 0 .. ``num_rows`` - 1, all of them each epoch. The order depends on (``seed``, epoch) alone."""

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool) -> None:
        assert num_rows > 0, "an order of no rows never ends"
        self._num_rows, self._seed, self._shuffle = num_rows, seed, shuffle
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
        return order
