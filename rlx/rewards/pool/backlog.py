"""Answers that wait for a judge, dealt so that one judge sees as many as it can of a group.

Answers to one prompt share a label, and often repeat: what a verifier remembers of one helps with the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable


class Backlog:
    """Groups of numbers. A judge takes from the group it is at, then from a fresh one, at last from where most is left."""

    def __init__(self) -> None:
        self._fresh: deque[deque[int]] = deque()
        self._begun: dict[Hashable, deque[int]] = {}
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, group: Iterable[int], *, first: bool = False) -> None:
        """One more group, to be begun after the others or before them."""
        numbers = deque(group)
        self._num += len(numbers)
        if numbers:
            (self._fresh.appendleft if first else self._fresh.append)(numbers)

    def take(self, judge: Hashable, num: int) -> list[int]:
        """The next ``num`` numbers for ``judge``, fewer if there are no more."""
        taken = [self._group_of(judge).popleft() for _ in range(min(num, self._num))]
        self._num -= len(taken)
        return taken

    def leave(self, judge: Hashable) -> None:
        """``judge`` takes no more; what is left of its group is a fresh one."""
        group = self._begun.pop(judge, None)
        if group:
            self._fresh.appendleft(group)

    def _group_of(self, judge: Hashable) -> deque[int]:
        group = self._begun.get(judge)
        if not group and self._fresh:
            group = self._begun[judge] = self._fresh.popleft()
        return group or max(self._begun.values(), key=len)
