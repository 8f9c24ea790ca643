"""A small file in shared memory by which a trainer rank and the engine ranks that read its buckets wait for each other.

Counters only grow, and each has one writer. Every reader has a page of its own: how many buckets it has taken, whether it is
done, and what it has to say. Both sides leave their process's number, so neither waits for one that is gone.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

PAGE_BYTES = 4096
_TEXT = 64
# Words (8 bytes) of the writer's page, and of a reader's.
_FILLED, _TOTAL, _GAVE_UP, _WRITER = range(4)
_TAKEN, _IS_DONE, _READER, _LENGTH, _LOST = range(5)
# How long a side that waits sleeps between two looks: little at first, for most waits are short.
_FIRST_SLEEP_S, _LAST_SLEEP_S = 20e-6, 2e-3
_LOOK_FOR_PEER_S = 0.1


class Flags:
    """``number`` readers are counted from 0. The writer makes the file (``create``), readers open it."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._map).cast("q")

    @classmethod
    def create(cls, path: str, num_readers: int) -> Flags:
        """A fresh file of this process's; OSError where there is no room for it."""
        with open(path, "xb") as file:
            os.posix_fallocate(file.fileno(), 0, PAGE_BYTES * (1 + num_readers))
        found = cls(path)
        found._words[_TOTAL] = -1
        found._words[_WRITER] = os.getpid()
        return found

    def close(self) -> None:
        self._words.release()
        self._map.close()

    def remove(self) -> None:
        """For good; who has it open keeps it as it is."""
        self.close()
        for path in (self.path, f"{self.path}.book"):
            Path(path).unlink(missing_ok=True)

    # The writer's words.

    @property
    def filled(self) -> int:
        return self._words[_FILLED]

    def fill(self, count: int) -> None:
        """So many buckets are there."""
        self._words[_FILLED] = count

    @property
    def is_complete(self) -> bool:
        """All buckets of this publication are filled."""
        return self._words[_TOTAL] == self._words[_FILLED]

    def complete(self) -> None:
        self._words[_TOTAL] = self._words[_FILLED]

    @property
    def gave_up(self) -> bool:
        return bool(self._words[_GAVE_UP])

    def give_up(self) -> None:
        self._words[_GAVE_UP] = 1

    @property
    def writer(self) -> int:
        return self._words[_WRITER]

    # A reader's.

    def enter(self, number: int) -> None:
        self._words[self._at(number) + _READER] = os.getpid()

    def reader(self, number: int) -> int:
        """Its process; 0 before it came."""
        return self._words[self._at(number) + _READER]

    def take(self, number: int, count: int) -> None:
        self._words[self._at(number) + _TAKEN] = count

    def taken(self, number: int) -> int:
        return self._words[self._at(number) + _TAKEN]

    def leave(self, number: int, problem: str) -> None:
        """This reader is done; ``problem`` is empty where all went well."""
        said = problem.encode(errors="replace")[: PAGE_BYTES - _TEXT]
        start = PAGE_BYTES * (1 + number) + _TEXT
        self._map[start : start + len(said)] = said
        self._words[self._at(number) + _LENGTH] = len(said)
        self._words[self._at(number) + _IS_DONE] = 1

    def is_done(self, number: int) -> bool:
        return bool(self._words[self._at(number) + _IS_DONE])

    def problem(self, number: int) -> str:
        start = PAGE_BYTES * (1 + number) + _TEXT
        return self._map[start : start + self._words[self._at(number) + _LENGTH]].decode(errors="replace")

    def lose(self, number: int) -> None:
        """The writer will not hear of this reader: what asked its engine has failed."""
        self._words[self._at(number) + _LOST] = 1

    def is_lost(self, number: int) -> bool:
        return bool(self._words[self._at(number) + _LOST])

    def _at(self, number: int) -> int:
        return PAGE_BYTES // 8 * (1 + number)


def wait_until(condition: Callable[[], bool], peer: Callable[[], int], limit_s: float) -> str | None:
    """Wait; None once the condition holds, or why not: the peer (its process; 0: not here yet) is gone, or time is up."""
    sleep_s, began = _FIRST_SLEEP_S, time.monotonic()
    looked = began
    while not condition():
        now = time.monotonic()
        if now - looked > _LOOK_FOR_PEER_S:
            looked, process = now, peer()
            if process and not is_alive(process):
                return None if condition() else f"process {process} has ended"
        if now - began > limit_s:
            return f"nothing for {limit_s:g} s"
        time.sleep(sleep_s)
        sleep_s = min(2 * sleep_s, _LAST_SLEEP_S)
    return None


def is_alive(process: int) -> bool:
    """Whether it runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"
