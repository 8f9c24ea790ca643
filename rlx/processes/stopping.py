"""What a driver and a trainer rank answer themselves: SIGUSR1 or a file asks to save and leave, SIGTERM and SIGINT end it.

Python runs signal handlers between two steps of the main thread's own code, which may be inside a collective for
minutes. What must not wait, ending, therefore hangs on the wake-up file descriptor, which the system's handler writes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

REQUEUE_STATUS = 75
"""Exit status of a run that saved and left when asked to: start it again and it goes on (EX_TEMPFAIL of sysexits.h)."""


class StopRequest:
    """From its birth (in the main thread) SIGUSR1, the file that RLX_STOP_FILE names, or ``file`` once it is there, asks this
    process to stop after the current step."""

    def __init__(self, file: Path | None = None) -> None:
        self._asked = False
        self._files = [name for name in (os.environ.get("RLX_STOP_FILE"), file) if name is not None]
        signal.signal(signal.SIGUSR1, self._ask)

    def is_set(self) -> bool:
        """Whether somebody asked."""
        return self._asked or any(map(os.path.exists, self._files))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def end_on_signals(end: Callable[[int], None]) -> None:
    """Call ``end(number)`` in a thread of its own when SIGTERM or SIGINT comes, whatever the main thread does then.

    Must be called in the main thread. ``end`` does not return to the program: it exits the process.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            for number in os.read(reading, 64):
                if number in numbers:
                    end(number)

    threading.Thread(target=watch, name="end-on-signals", daemon=True).start()
