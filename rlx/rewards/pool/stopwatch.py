"""A page of memory that two processes share: which answer a judge is at, and since when.

It costs the judge no message, and says after a judge's death what it died of.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

_PAGE = struct.Struct("<dq")
NOTHING = 0


class Stopwatch:
    """``start`` is the judge's, ``read`` the dispatcher's. Times are of the machine's monotonic clock."""

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, mmap.PAGESIZE)

    def start(self, number: int) -> None:
        """The judge begins with answer ``number`` now (NOTHING: it waits for more)."""
        # The time first: a reader that sees one new value and one old one then never takes the answer for late.
        struct.pack_into("<d", self._page, 0, time.monotonic())
        struct.pack_into("<q", self._page, 8, number)

    def read(self) -> tuple[int, float]:
        """The answer begun last, and when."""
        while True:
            since_s, number = _PAGE.unpack_from(self._page)
            if _PAGE.unpack_from(self._page) == (since_s, number):
                return number, since_s

    def close(self) -> None:
        self._page.close()


def shared_page() -> int:
    """A file descriptor of a new page, for both ends' ``Stopwatch``."""
    descriptor = os.memfd_create("rlx-stopwatch")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return descriptor
