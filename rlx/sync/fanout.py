"""Calls to several engines at once, none of which can hold up the process.

The threads are daemons: one that hangs in a call past its limit is left behind and does not keep the process alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from threading import Thread

from rlx.rollout.sglang.control import EngineControlError
from rlx.sync.errors import SyncError

# After a first failure the others are given this long to fail as well: when an engine dies, its peers may complain first.
SETTLE_S = 0.5


def start[T](call: Callable[[], T]) -> Future[T]:
    """Run ``call`` in a thread of its own."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # whoever reads the future raises it again
            future.set_exception(error)

    Thread(target=body, daemon=True).start()
    return future


def finished[T](call: Callable[[], T]) -> Future[T]:
    """Run ``call`` here and now; how it went, as of a thread."""
    future: Future[T] = Future()
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
    return future


def raised[T](futures: Mapping[str, Future[T]]) -> dict[str, BaseException]:
    """Who has failed or does so within ``SETTLE_S``, and how. A call that goes on has not."""
    wait(futures.values(), timeout=SETTLE_S)
    return {who: error for who, future in futures.items() if future.done() and (error := future.exception()) is not None}


def failures[T](futures: Mapping[str, Future[T]], limit_s: float) -> dict[str, BaseException]:
    """Wait until all are done, or ``SETTLE_S`` after the first failure, or ``limit_s``. Returns who failed and how.

    A call that is not done after ``limit_s`` has failed with ``TimeoutError``; empty means that all went well.
    """
    began = time.monotonic()
    wait(futures.values(), timeout=limit_s, return_when=FIRST_EXCEPTION)
    timed_out = time.monotonic() - began >= limit_s
    wait(futures.values(), timeout=0.0 if timed_out else SETTLE_S)
    found: dict[str, BaseException] = {}
    for who, future in futures.items():
        error = future.exception() if future.done() else None
        if error is not None:
            found[who] = error
        elif timed_out and not future.done():
            found[who] = TimeoutError(f"not done within {limit_s:g} s")
    return found


def unwell(found: Mapping[str, BaseException]) -> list[str]:
    """Of those that failed, the ones that are in a bad way themselves: they did not merely refuse what was asked, and were
    not merely found to be unfit (a SyncError says of itself which engines are to be replaced)."""
    return [who for who, error in found.items() if not _is_well(who, error)]


def _is_well(who: str, error: BaseException) -> bool:
    if isinstance(error, SyncError):
        return who not in error.engines
    return isinstance(error, EngineControlError) and error.refused


def describe(found: Mapping[str, BaseException]) -> str:
    """One line for an error message; an error that already begins with its engine's name is not named twice."""
    return "; ".join(text if who in (text := str(error)) else f"{who}: {text}" for who, error in found.items())


def call_all[T](calls: Mapping[str, Callable[[], T]], limit_s: float) -> dict[str, T]:
    """Make all calls at once and return their results by name. Raises SyncError naming those that failed."""
    futures = {who: start(call) for who, call in calls.items()}
    found = failures(futures, limit_s)
    if found:
        raise SyncError(describe(found), unwell(found)) from next(iter(found.values()))
    return {who: future.result() for who, future in futures.items()}
