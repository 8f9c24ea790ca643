"""Dealing samples out evenly: to data-parallel ranks, and into micro-batches under a budget. Pure arithmetic on numbers.

A *bin* is a rank or a micro-batch. ``work`` is what is evened out, ``sizes`` what the budget limits.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace

# Bins whose heaviest is this close to the mean are left as they are; and how many of the lightest a swap is looked for in.
_EVEN, _PARTNERS = 1.002, 4


@dataclass(slots=True)
class _Bin:
    members: list[int] = field(default_factory=list)
    size: int = 0
    work: int = 0

    def add(self, index: int, size: int, work: int) -> None:
        self.members.append(index)
        self.size += size
        self.work += work


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a micro-batch may hold: ``sizes`` that add up to ``capacity``, and whatever else ``allows`` says of its members. A
    sample larger than the capacity may be alone."""

    sizes: Mapping[int, int]
    capacity: int
    allows: Callable[[Iterable[int]], bool] | None = None

    def holds(self, members: Sequence[int], size: int) -> bool:
        """Whether these samples, of ``size`` together, may be in one micro-batch."""
        return len(members) < 2 or (size <= self.capacity and (self.allows is None or self.allows(members)))

    def is_in(self, found: _Bin, index: int) -> bool:
        """Whether there is some for one more sample."""
        if not found.members:
            return True
        fits = found.size + self.sizes[index] <= self.capacity
        return fits and (self.allows is None or self.allows([*found.members, index]))


def largest_first(indices: Iterable[int], sizes: Mapping[int, int]) -> list[int]:
    """Ordered by size, equal ones by their numbers."""
    return sorted(indices, key=lambda index: (-sizes[index], index))


def deal(work: Mapping[int, int], num_ranks: int) -> list[list[int]]:
    """The samples of each rank: the one of most work first, each to the rank with the least so far, then swaps. No two ranks
    differ by more than the sample of most work."""
    bins = [_Bin() for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap
    for index in largest_first(work, work):
        load, rank = loads[0]
        bins[rank].add(index, 0, work[index])
        heapreplace(loads, (load + work[index], rank))
    _even_out(bins, work, Room(sizes=dict.fromkeys(work, 0), capacity=0))
    return [found.members for found in bins]


def fewest_bins(indices: Sequence[int], work: Mapping[int, int], room: Room) -> int:
    """How many micro-batches ``pack`` needs for these samples, at least 1."""
    sizes = [room.sizes[index] for index in indices]
    count = max(1, -(-sum(sizes) // max(1, room.capacity)))
    if smallest := min(sizes, default=0):  # so many samples at most are in one: spares trying numbers that cannot do
        count = max(count, -(-len(sizes) // max(1, room.capacity // smallest)))
    most = len(_first_fit(indices, work, room))
    return next((fewer for fewer in range(count, most) if _evenly(indices, work, room, fewer) is not None), max(1, most))


def pack(indices: Sequence[int], work: Mapping[int, int], room: Room, count: int) -> list[list[int]]:
    """The samples in ``count`` micro-batches of even work, no fewer than ``fewest_bins``; some are empty where there are fewer
    samples."""
    bins = _evenly(indices, work, room, count)
    if bins is None:
        bins = _first_fit(indices, work, room)
        bins += [_Bin() for _ in range(count - len(bins))]
    _even_out(bins, work, room)
    return [found.members for found in bins]


def _evenly(indices: Sequence[int], work: Mapping[int, int], room: Room, count: int) -> list[_Bin] | None:
    """The sample of most work first, each to the bin with the least work that has room; None where one has none."""
    bins = [_Bin() for _ in range(count)]  # ordered by work
    for index in largest_first(indices, work):
        place = next((place for place, found in enumerate(bins) if room.is_in(found, index)), None)
        if place is None:
            return None
        target = bins.pop(place)
        target.add(index, room.sizes[index], work[index])
        insort(bins, target, key=_work)
    return bins


def _first_fit(indices: Sequence[int], work: Mapping[int, int], room: Room) -> list[_Bin]:
    """The largest first, each into the first bin that has room: few bins, not even ones."""
    bins: list[_Bin] = []
    for index in largest_first(indices, room.sizes):
        most = room.capacity - room.sizes[index]
        target = next((found for found in bins if found.size <= most and room.is_in(found, index)), None)
        if target is None:
            bins.append(target := _Bin())
        target.add(index, room.sizes[index], work[index])
    return bins


def _work(found: _Bin) -> int:
    return found.work


def _even_out(bins: list[_Bin], work: Mapping[int, int], room: Room) -> None:
    """Move or swap samples between the heaviest bin and light ones as long as the heavier of the two gets lighter."""
    if len(bins) < 2:
        return
    mean = sum(found.work for found in bins) / len(bins)
    by_work = sorted(bins, key=_work)
    for _ in range(4 * len(bins)):
        *others, heaviest = by_work
        if heaviest.work <= mean * _EVEN or not any(_improve(heaviest, light, work, room) for light in others[:_PARTNERS]):
            return
        by_work.sort(key=_work)


def _improve(heavy: _Bin, light: _Bin, work: Mapping[int, int], room: Room) -> bool:
    """Carry out the move or swap that leaves the two closest to each other; False where none helps."""
    gap = heavy.work - light.work
    exchanges = [
        (abs(gap - 2 * moved), -moved, one, other)
        for one in heavy.members
        for other in (None, *light.members)
        if 0 < (moved := work[one] - (0 if other is None else work[other])) < gap
    ]
    for _, _, one, other in sorted(exchanges, key=lambda found: found[:2])[:16]:
        gives, takes = [one], [] if other is None else [other]
        kept = [index for index in heavy.members if index != one] + takes
        filled = [index for index in light.members if index != other] + gives
        shift = room.sizes[one] - sum(room.sizes[index] for index in takes)
        if room.holds(kept, heavy.size - shift) and room.holds(filled, light.size + shift):
            moved = work[one] - sum(work[index] for index in takes)
            heavy.members, light.members = kept, filled
            heavy.size, light.size = heavy.size - shift, light.size + shift
            heavy.work, light.work = heavy.work - moved, light.work + moved
            return True
    return False
