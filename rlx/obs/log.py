"""Each process's log: who it is, which phase it is in, and how it failed, in lines that a supervisor can read back.

A process writes to its own standard error, which the launcher points at ``RUN_DIR/logs/ROLE-RANK.log``. Two kinds of
lines are meant for machines as well as people:

    2026-01-31T12:00:00.123 trainer-1 PHASE step=3 update policy
    2026-01-31T12:00:01.456 trainer-1 FAILED step=3 phase="update policy" cause="ValueError: ..."

``last_phase`` and ``first_failure`` read them back from a log's text. Lines of the driver and of rank 0 that begin with
NOTICE are shown to the user as well.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

_PHASE = re.compile(r"^(\S+) (\S+) PHASE step=(-?\d+) (.+)$", re.MULTILINE)
_FAILED = re.compile(r'^(\S+) (\S+) FAILED step=(-?\d+) phase="([^"]*)" cause="(.*)"$', re.MULTILINE)

WAITING = "wait for the driver"
"""The phase of a trainer rank between two commands."""

logger = logging.getLogger("rlx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Where a process is: step -1 is before the first step."""

    step: int = -1
    name: str = "start"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a process said it failed. ``when`` is an ISO time that sorts as text; ``who`` is ROLE-RANK."""

    when: str
    who: str
    phase: Phase
    cause: str


_state: dict[str, Phase | str] = {"who": "rlx-0", "phase": Phase()}


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return f"{when} {_state['who']} {level}{text}"


def start_log(role: str, rank: int) -> None:
    """Name this process in its log lines and send them to standard error."""
    _state["who"] = f"{role}-{rank}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def current_phase() -> Phase:
    """The phase this process is in."""
    value = _state["phase"]
    assert isinstance(value, Phase)
    return value


def enter_phase(now: Phase) -> None:
    """Be in a phase from here on, until the next one is entered."""
    _state["phase"] = now
    logger.info("PHASE step=%d %s", now.step, now.name)


@contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """Enter a phase; without ``step`` the one of the outer phase stays. A failure inside keeps the phase for its report."""
    before = current_phase()
    enter_phase(Phase(step=before.step if step is None else step, name=name))
    yield
    _state["phase"] = before


def notice(text: str) -> None:
    """Log a line that the user of the run should see on the terminal too."""
    logger.info("NOTICE %s", text)


def log_failure(error: BaseException) -> None:
    """Write the FAILED line (one line, quotes softened) after the traceback."""
    now = current_phase()
    cause = f"{type(error).__name__}: {error}".replace('"', "'").replace("\n", " | ")
    logger.error("traceback", exc_info=error)
    logger.info('FAILED step=%d phase="%s" cause="%s"', now.step, now.name, cause)


def last_phase(text: str) -> Phase:
    """The last phase named in a log's text."""
    found = _PHASE.findall(text)
    return Phase(step=int(found[-1][2]), name=found[-1][3]) if found else Phase()


def first_failure(text: str) -> Failure | None:
    """The first FAILED line of a log's text."""
    match = _FAILED.search(text)
    if match is None:
        return None
    when, who, step, name, cause = match.groups()
    return Failure(when=when, who=who, phase=Phase(step=int(step), name=name), cause=cause)
