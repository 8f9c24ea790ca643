"""Ending a process and everything it started, on Linux.

A judge is the subreaper of what its verifier starts, so that a grandchild whose parent died, or that left its session, is
still below the judge in the process tree.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MAX_ROUNDS = 50


def become_subreaper() -> None:
    """Orphans below this process become its children; this process dies with its parent."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def kill_below(pid: int) -> None:
    """Kill every descendant of ``pid``, again and again while new ones appear."""
    for _ in range(_MAX_ROUNDS):
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = [child for child in psutil.Process(pid).children(recursive=True) if _is_alive(child)]
        if not found:
            return
        for child in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def kill_tree(pid: int) -> None:
    """Stop ``pid``, so that it starts nothing more, kill all below it, then itself. Nothing happens if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.suspend()
        kill_below(pid)
        process.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
