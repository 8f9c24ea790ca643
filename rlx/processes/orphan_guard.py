"""A small process beside the launcher that ends what the launcher leaves behind when it dies.

Children end by themselves (``parent.py``), unless they are stuck, not yet listening or left grandchildren in sessions
of their own; the guard catches those and tells the terminal, as the launcher no longer can.

Consumes lines on standard input: ``session PID`` for each child, ``done`` when the launcher ends in order. Waits for
the end of input; produces at most three lines on standard error. Stops when it is through.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from rlx.obs.log import last_phase
from rlx.processes.causes import where
from rlx.processes.children import LAUNCH_ID, kill_members, living_members

_GRACE_S = 4.0


class Guard:
    """The launcher's handle on its guard process, which writes to the same standard error."""

    def __init__(self, *, launch_id: str, launcher_pid: int, log: Path, env: Mapping[str, str]) -> None:
        log_start = log.stat().st_size if log.exists() else 0  # what earlier runs left in the driver's log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlx.processes.orphan_guard", launch_id, str(launcher_pid), str(log), str(log_start)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={name: value for name, value in env.items() if name != LAUNCH_ID},  # its own mark would have it ended too
            start_new_session=True,
            text=True,
        )

    def add(self, session: int) -> None:
        """Tell it of a child's session."""
        self._say(f"session {session}")

    def dismiss(self) -> None:
        """The launcher ends in order: nothing is left to guard."""
        self._say("done")
        try:
            self._process.communicate(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say(self, line: str) -> None:
        stream = self._process.stdin
        assert stream is not None
        try:
            print(line, file=stream, flush=True)
        except BrokenPipeError:  # someone killed the guard; the run itself is sound without it
            return


def _end_leftovers(sessions: Collection[int], launch_id: str) -> list[int]:
    """Give the children time to end by themselves, then kill. Returns what still lives."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and living_members(sessions, launch_id):
        time.sleep(0.1)
    return kill_members(sessions, launch_id, limit_s=5.0)


def _report(launcher_pid: int, log: Path, log_start: int, left: Collection[int]) -> str:
    text = log.read_bytes()[log_start:].decode("utf-8", errors="replace") if log.exists() else ""
    fate = f"processes still alive: {sorted(left)}" if left else "all its processes were ended"
    return (
        f"rlx: FAILED launcher (pid {launcher_pid}) died while the driver was {where(last_phase(text))}\n"
        f"rlx: cause: the launcher was killed or crashed; {fate}\n"
        f"rlx: logs: {log}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="ends what a dead launcher leaves behind; started by the launcher")
    parser.add_argument("launch_id")
    parser.add_argument("launcher_pid", type=int)
    parser.add_argument("log", type=Path, help="the driver's log")
    parser.add_argument("log_start", type=int, help="bytes of it that are older than this launch")
    args = parser.parse_args()
    sessions: set[int] = set()
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "done":
            return
        if word == "session" and number.isdigit():
            sessions.add(int(number))
    left = _end_leftovers(sessions, args.launch_id)
    try:
        sys.stderr.write(_report(args.launcher_pid, args.log, args.log_start, left))
        sys.stderr.flush()
    except OSError:  # the terminal is gone as well
        return


if __name__ == "__main__":
    main()
