"""Watch the children of one launch until the training is done, something fails or someone interrupts.

The supervisor looks at every child each 0.2 s. It consumes their exits and logs and a flag set by signal handlers;
it produces one ``Outcome``; it starts and stops nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from rlx.obs.log import Phase, last_phase
from rlx.processes.causes import (
    Cause,
    Ended,
    cause_of,
    first_cause,
)
from rlx.processes.children import Identity
from rlx.processes.stopping import REQUEUE_STATUS

_POLL_S = 0.2
_SETTLE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``cause`` when something failed, ``interrupted`` when a signal came; neither when the training is done, or when it saved
    and left because it was asked to (``left_early``)."""

    cause: Cause | None = None
    interrupted: bool = False
    left_early: bool = False


@dataclass(frozen=True, slots=True)
class Exit:
    """A child's status, and the times of the looks around its end."""

    returncode: int
    seen_alive: str
    seen_ended: str


def now_text() -> str:
    """The time as log lines spell it, so that both sort together."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]


class Watched(Protocol):
    """A process or an actor that a supervisor looks at."""

    @property
    def spec(self) -> Identity: ...

    def poll(self) -> int | None:
        """None while it lives; then 0, an exit status or minus a signal."""

    def log_text(self) -> str:
        """What it wrote."""

    def why(self) -> str | None:
        """How it ended, where more is known than its status."""


def ended(child: Watched, seen: Exit) -> Ended:
    """What is known of a child's end; it was in the phase that its own log says."""
    log = child.log_text()
    return Ended(
        role=child.spec.role,
        rank=child.spec.rank,
        returncode=seen.returncode,
        seen_alive=seen.seen_alive,
        seen_ended=seen.seen_ended,
        log=log,
        log_path=child.spec.log_path,
        phase=last_phase(log),
        why=child.why(),
    )


class EngineWatch(Protocol):
    """The engines of a launch, as far as their supervisor asks."""

    def children(self) -> Sequence[Watched]:
        """The present ones."""

    def failed(self) -> Cause | None:
        """An engine that runs but never became healthy."""

    def forgives(self, child: Watched) -> bool:
        """Whether this engine's end is made good."""

    def serving(self) -> bool:
        """Whether all of them were healthy."""


class NoEngines:
    """Of a launch that starts none."""

    def children(self) -> Sequence[Watched]:
        return ()

    def failed(self) -> Cause | None:
        return None

    def forgives(self, child: Watched) -> bool:
        return False

    def serving(self) -> bool:
        return True


class Supervisor:
    """Watches ``trainers`` (the driver first, then the ranks) and ``engines``; ``tick`` is called at each look."""

    def __init__(
        self,
        trainers: Sequence[Watched],
        engines: EngineWatch,
        *,
        interrupted: Callable[[], bool],
        tick: Callable[[], None],
    ) -> None:
        self._trainers = tuple(trainers)
        self._engines = engines
        self._interrupted = interrupted
        self._tick = tick
        self._exits: dict[Watched, Exit] = {}
        self._last_look = now_text()
        self._first_done: float | None = None

    def watch(self, leave_timeout_s: float) -> Outcome:
        """Return when it is over. All trainers must end within ``leave_timeout_s`` of the first that is done."""
        while not self._interrupted():
            done = self._look()
            self._tick()
            if self._causes() or self._overdue(leave_timeout_s):
                return self._settle(leave_timeout_s)
            if done:
                return Outcome(left_early=any(seen.returncode == REQUEUE_STATUS for seen in self._exits.values()))
            time.sleep(_POLL_S)
        return Outcome(interrupted=True)

    def _look(self) -> bool:
        """Note who ended since the last look. True when all trainers are done and well."""
        began = now_text()
        for child in (*self._trainers, *self._engines.children()):
            status = child.poll()
            if status is not None and child not in self._exits:
                self._exits[child] = Exit(status, self._last_look, now_text())
        self._last_look = began
        done = [self._ended_well(child) for child in self._trainers]
        if any(done) and self._first_done is None:
            self._first_done = time.monotonic()
        return all(done)

    def _settle(self, leave_timeout_s: float) -> Outcome:
        """Give the others a moment to say how they failed; one of them may have been first."""
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline and not self._is_settled() and not self._interrupted():
            time.sleep(_POLL_S)
            self._look()
        causes = self._causes() or self._overdue(leave_timeout_s)
        self._tick()
        return Outcome(cause=first_cause(causes))

    def _is_settled(self) -> bool:
        """All trainers ended and one of the causes explains the others; engines outlive trainers without complaint."""
        return all(trainer in self._exits for trainer in self._trainers) and any(not c.consequence for c in self._causes())

    def _causes(self) -> list[Cause]:
        causes = [cause_of(self._ended(child, seen)) for child, seen in self._exits.items() if self._is_failure(child, seen)]
        unhealthy = None if causes else self._engines.failed()
        return causes if unhealthy is None else [unhealthy]

    def _is_failure(self, child: Watched, seen: Exit) -> bool:
        """A trainer may end well; an engine is to serve until we stop it, which is after the last trainer ended."""
        if child in self._trainers:
            return not self._ended_well(child)
        if self._engines.forgives(child):
            return False
        return seen.returncode != 0 or not all(map(self._ended_well, self._trainers))

    def _ended_well(self, child: Watched) -> bool:
        """Done, or saved and left because it was asked to."""
        return child in self._exits and self._exits[child].returncode in (0, REQUEUE_STATUS)

    def _ended(self, child: Watched, seen: Exit) -> Ended:
        found = ended(child, seen)
        return replace(found, phase=self._phase(child, found.phase))

    def _phase(self, child: Watched, own: Phase) -> Phase:
        """Where a child is. An engine that serves has no step of its own: it is where the job is."""
        if child not in self._trainers and own.step < 0:
            return last_phase(self._trainers[0].log_text()) if self._engines.serving() else Phase(name="start engine")
        return own

    def _overdue(self, limit_s: float) -> list[Cause]:
        """Trainers that hang while others are done."""
        if self._first_done is None or time.monotonic() - self._first_done < limit_s:
            return []
        return [
            Cause(
                role=child.spec.role,
                rank=child.spec.rank,
                phase=last_phase(child.log_text()),
                cause=f"did not end within {limit_s:g} s of the first trainer rank that was done",
                log_path=child.spec.log_path,
                when=now_text(),
            )
            for child in self._trainers
            if child not in self._exits
        ]
