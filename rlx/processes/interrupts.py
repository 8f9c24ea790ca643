"""Ctrl-C, SIGTERM and a closed terminal, as flags that a loop looks at."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Inside the ``with`` block (main thread only) the signals are counted instead of ending the process."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in _SIGNALS:
            # A program started under nohup keeps ignoring the hang-up.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def number(self) -> int:
        """The first signal; 0 for none."""
        return self._received[0] if self._received else 0

    @property
    def name(self) -> str:
        """Its name, such as SIGINT."""
        return signal.Signals(self.number).name if self.number else "no signal"

    def is_set(self) -> bool:
        """Whether to stop."""
        return bool(self._received)

    def is_urgent(self) -> bool:
        """Whether to stop at once: a second signal came."""
        return len(self._received) > 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
