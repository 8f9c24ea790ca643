"""Which of several failures came first: pure functions over what ended, when, and what it had logged.

When one process of a job dies, the others lose their connections and fail too. A supervisor that reported whoever it
happened to look at first would blame them. The rules, in order:

1. A failure whose own words speak of a lost peer is a *consequence*; it is named only if nothing else failed.
2. Of the rest, the earliest wins. A process that was killed may have died any time since the last look at it, so that
   look counts as its time; one that raised has the time of its FAILED line.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlx.obs.log import Failure, Phase, first_failure

_LOST_PEER = re.compile(
    r"connection (to [^:|]+ )?(was |is |likely )*(closed|reset|refused|aborted|lost)|broken ?pipe|socket closed"
    r"|server disconnected"
    r"|Connect(ion)?(Aborted|Refused|Reset)?Error|ReadError|WriteError|RemoteProtocolError|ServerDisconnected|ClientOSError"
    r"|ClientConnector|remote process exited|ncclRemoteError|closed by peer|recvValue failed|sendBytes failed|recvBytes failed"
    r"|did the remote server shutdown|timed out waiting \S+ ?ms for (recv|send)|cannot connect to host|all connection attempts"
    r"|peer (closed|disconnected)|no longer reachable",
    re.IGNORECASE,
)
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use|port is already in use", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A child that ended badly. ``seen_alive`` and ``seen_ended`` are ISO times (UTC) of the looks around its end;
    ``returncode`` is minus the signal; ``log`` is what it wrote; ``phase`` where it, or the job, was; ``why`` how it ended,
    where more is known than the status."""

    role: str
    rank: int
    returncode: int
    seen_alive: str
    seen_ended: str
    log: str
    log_path: Path
    phase: Phase
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Who failed, where and why. ``told`` is True when the process itself logged it."""

    role: str
    rank: int
    phase: Phase
    cause: str
    log_path: Path
    when: str
    consequence: bool = False
    told: bool = False


def where(phase: Phase) -> str:
    """``in phase "update policy" of step 3``."""
    return f'in phase "{phase.name}" ' + ("before the first step" if phase.step < 0 else f"of step {phase.step}")


def describe(returncode: int) -> str:
    """An exit in words: ``killed by signal 9 (SIGKILL)``, ``exited with status 1``."""
    if returncode >= 0:
        return f"exited with status {returncode}" + ("" if returncode else " before the training was done")
    known = {member.value: member.name for member in signal.Signals}
    return f"killed by signal {-returncode} ({known.get(-returncode, 'unknown')})"


def speaks_of_lost_peer(text: str) -> bool:
    """Whether a cause is what a process sees when another one is gone."""
    return _LOST_PEER.search(text) is not None


def is_port_taken(log: str) -> bool:
    """Whether a process that failed could not listen on the port it was given."""
    return _PORT_TAKEN.search(tail(log, 40)) is not None


def tail(text: str, num_lines: int) -> str:
    """The last lines that hold anything."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-num_lines:])


def shown_log(cause: Cause, log: str) -> list[str]:
    """The end of the log of whoever is to blame, for the terminal; nothing where ``cause`` quotes it already."""
    if cause.told or not log.strip():
        return []
    return [f"rlx: last lines of {cause.log_path.name}:", *(f"    {line}" for line in tail(log, 12).splitlines())]


def cause_of(ended: Ended) -> Cause:
    """One child's own cause: its FAILED line where it wrote one, else how it ended."""
    failure: Failure | None = first_failure(ended.log)
    if failure is not None:
        phase = failure.phase if ended.role in ("driver", "trainer") or failure.phase.step >= 0 else ended.phase
        return _cause(ended, phase, failure.cause, failure.when, consequence=speaks_of_lost_peer(failure.cause), told=True)
    # Aborts and plain exits follow a collapse that took the process some time to notice; a kill does not.
    sudden = ended.returncode < 0 and -ended.returncode != signal.SIGABRT
    consequence = not sudden and ended.returncode != 0 and speaks_of_lost_peer(tail(ended.log, 15))
    when = ended.seen_alive if sudden else ended.seen_ended
    return _cause(ended, ended.phase, ended.why or describe(ended.returncode), when, consequence=consequence, told=False)


def first_cause(causes: Sequence[Cause]) -> Cause:
    """The failure to report, by the rules above. Needs at least one."""
    return min(causes, key=lambda cause: (cause.consequence, cause.when, cause.role, cause.rank))


def _cause(ended: Ended, phase: Phase, cause: str, when: str, *, consequence: bool, told: bool) -> Cause:
    return Cause(
        role=ended.role,
        rank=ended.rank,
        phase=phase,
        cause=cause,
        log_path=ended.log_path,
        when=when,
        consequence=consequence,
        told=told,
    )
