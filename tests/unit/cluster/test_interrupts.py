"""What the signals that a launcher gets ask of it."""

from __future__ import annotations

import os
import signal
import time

import pytest

from rlx.processes.interrupts import SAME_S, Interrupts, keep_handlers

INT, TERM, USR1, LATER = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, 0


@pytest.mark.parametrize(
    ("saves", "numbers", "asked", "ended", "urgent", "status", "name"),
    [
        (True, [USR1], True, False, False, 75, "SIGUSR1"),
        (True, [TERM], True, False, False, 75, "SIGTERM"),
        (True, [USR1, TERM, USR1], True, False, False, 75, "SIGUSR1"),
        (True, [TERM, TERM], True, False, False, 75, "SIGTERM"),
        (True, [TERM, TERM, LATER, TERM], True, True, False, 143, "SIGTERM"),
        (True, [USR1, LATER, TERM], True, False, False, 75, "SIGUSR1"),
        (True, [TERM, LATER, TERM, TERM], True, True, True, 143, "SIGTERM"),
        (True, [TERM, INT], True, True, False, 130, "SIGINT"),
        (True, [INT], False, True, False, 130, "SIGINT"),
        (True, [INT, INT], False, True, True, 130, "SIGINT"),
        (False, [TERM], False, True, False, 143, "SIGTERM"),
    ],
)
def test_the_first_sigterm_asks_to_save_where_the_run_can(
    saves: bool,
    numbers: list[int],
    asked: bool,
    ended: bool,
    urgent: bool,
    status: int,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    before = signal.getsignal(USR1)
    with Interrupts(saves=saves) as interrupts:
        for number in numbers:
            if number == LATER:
                clock += SAME_S
            else:
                os.kill(os.getpid(), number)
        found = (interrupts.ask_to_save(), interrupts.is_set(), interrupts.is_urgent(), interrupts.status, interrupts.name)
    assert found == (asked, ended, urgent, status, name)
    assert signal.getsignal(USR1) is before


def test_handlers_of_a_library_do_not_stay() -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        ours = signal.getsignal(signal.SIGUSR1)
        with keep_handlers():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is ours
    finally:
        signal.signal(signal.SIGUSR1, before)
