"""Signals that a launcher gets, as flags that its loop looks at: Ctrl-C and a closed terminal end the run, SIGUSR1 and the
first SIGTERM (preemption, ``docker stop``) ask it to save and leave, where it can; a SIGTERM some seconds later ends it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rlx.processes.stopping import REQUEUE_STATUS

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A scheduler may send its SIGTERM twice at once, which is one request.
SAME_S = 5.0


@contextmanager
def keep_handlers() -> Iterator[None]:
    """Installs the present handlers again behind what is called inside (main thread only): a library may put its own below
    Python's, unseen. Ray's ends a process 3 s after a SIGTERM that the process heeds."""
    before = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


class Interrupts:
    """Inside the ``with`` block (main thread only) the signals are counted instead of ending the process. ``saves``: the run
    can be asked to save and leave; otherwise SIGUSR1 is left alone and the first SIGTERM ends it."""

    def __init__(self, *, saves: bool = False) -> None:
        self._saves = saves
        self._received: list[int] = []
        self._asking: list[int] = []
        self._term_at: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (*_ENDING, *([signal.SIGUSR1] if self._saves else [])):
            # A program started under nohup keeps ignoring the hang-up.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def number(self) -> int:
        """The first signal that ends the run; 0 for none."""
        return self._received[0] if self._received else 0

    @property
    def name(self) -> str:
        """Its name, such as SIGINT, or that of the signal that asked to save and leave."""
        numbers = self._received or self._asking
        return signal.Signals(numbers[0]).name if numbers else "no signal"

    @property
    def status(self) -> int:
        """The exit status of a run that they ended."""
        return 128 + self.number if self.number else REQUEUE_STATUS

    @property
    def promise(self) -> str:
        """What the user is told when the run has been asked to save and leave."""
        return (
            f"{self.name}: saving after this step, then leaving with status {REQUEUE_STATUS}; Ctrl-C or SIGTERM ends it at once"
        )

    def is_set(self) -> bool:
        """Whether to stop."""
        return bool(self._received)

    def is_urgent(self) -> bool:
        """Whether to stop at once: a second signal came."""
        return len(self._received) > 1

    def ask_to_save(self) -> bool:
        """Whether to save and leave."""
        return bool(self._asking)

    def _note(self, number: int, frame: FrameType | None) -> None:
        asks = number == signal.SIGUSR1
        if number == signal.SIGTERM and self._saves:
            self._term_at = self._term_at or time.monotonic()
            asks = time.monotonic() - self._term_at < SAME_S
        (self._asking if asks else self._received).append(number)
