"""Start, watch and end child processes, grandchildren included. Knows nothing of trainers or engines.

Each child leads a session of its own, so a Ctrl-C in the terminal reaches only the launcher, and a whole tree can be
ended by one signal to its process group. A child that ended is not reaped until ``reap``: its number cannot be handed
to a stranger while we may still signal its group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCH_ID = "RLX_LAUNCH_ID"
"""Environment variable that every process of one launch inherits: finds those that left their session."""
JOB_ID = "RLX_JOB_ID"
"""The same of a job on many nodes, which holds several launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whom a process or an actor is, and where it writes."""

    role: str
    rank: int
    log_path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec(Identity):
    """What to start. ``env`` is the whole environment; ``pass_fds`` stay open in the child; the log is appended to."""

    argv: Sequence[str]
    env: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()


class Child:
    """A started process. Raises OSError at birth when the program cannot be started."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        with spec.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                list(spec.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(spec.env),
                pass_fds=spec.pass_fds,
                start_new_session=True,
            )
        self._returncode: int | None = None
        self._reaped = False

    @property
    def pid(self) -> int:
        """Process, process group and session number."""
        return self._process.pid

    def poll(self) -> int | None:
        """None while it runs; then its exit status, or minus the signal that ended it. Does not reap."""
        if self._returncode is None:
            try:
                found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # reaped by another thread just now
                return self._process.returncode
            if found is not None:
                self._returncode = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return self._returncode

    def log_text(self) -> str:
        """What this child wrote, without what earlier runs left in the same file."""
        with self.spec.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", errors="replace")

    def why(self) -> str | None:
        """Nothing is known of a process's end but its status."""
        return None

    def signal_group(self, number: int) -> None:
        """Signal the child and those of its descendants that stayed in its process group."""
        if self._reaped:
            return
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return

    def reap(self, timeout_s: float) -> None:
        """Collect the exit status; the number is free afterwards. Leaves a child that does not end as it is."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return
        self._reaped = True


def living_members(sessions: Collection[int], launch_id: str | None, *, variable: str = LAUNCH_ID) -> list[int]:
    """Numbers of living processes (no zombies) in one of the sessions, or born with ``variable`` = ``launch_id``. Needs
    /proc."""
    marker = None if launch_id is None else f"{variable}={launch_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            # The command stands in parentheses and may itself hold spaces and parentheses.
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            # While a killed process's threads end, its first one is a zombie already but its sockets are still open.
            if fields[0] in ("Z", "X") and int(fields[17]) <= 1:
                continue
            if int(fields[3]) in sessions or (marker is not None and marker in (entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def kill_members(
    sessions: Collection[int],
    launch_id: str | None,
    limit_s: float,
    *,
    variable: str = LAUNCH_ID,
    spare: Collection[int] = (),
) -> list[int]:
    """SIGKILL all members but ``spare`` until none lives or the limit is over. Returns those that still live."""
    deadline = time.monotonic() + limit_s
    while alive := [pid for pid in living_members(sessions, launch_id, variable=variable) if pid not in spare]:
        if time.monotonic() > deadline:
            break
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.05)
    return alive


def end_now(child: Child) -> None:
    """SIGKILL the child and its session, and wait a few seconds until it is gone."""
    child.signal_group(signal.SIGKILL)
    kill_members({child.pid}, None, limit_s=3.0)
    child.reap(timeout_s=1.0)


def stop_all(
    children: Sequence[Child],
    launch_id: str | None = None,
    *,
    grace_s: float = 3.0,
    hurry: Callable[[], bool] = lambda: False,
) -> list[int]:
    """End all children and their descendants: SIGTERM, then after ``grace_s`` (or once ``hurry()``) SIGKILL.

    With ``launch_id`` every process of that launch is ended. Returns the numbers of processes that outlived SIGKILL by
    3 s (stuck in the kernel), normally none.
    """
    sessions = {child.pid for child in children}
    for child in children:
        child.signal_group(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and not hurry() and living_members(sessions, launch_id):
        time.sleep(0.05)
    for child in children:
        child.signal_group(signal.SIGKILL)
    left = kill_members(sessions, launch_id, limit_s=3.0)
    for child in children:
        child.reap(timeout_s=1.0)
    return left
