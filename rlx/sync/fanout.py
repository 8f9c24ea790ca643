"""Calls to several engines at once, none of which can hold up the process.

The threads are daemons: one that hangs in a call past its limit is left behind and does not keep the process alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def start(call: Callable[[], T]) -> Future[T]:
    """Run ``call`` in a thread of its own."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # the thread's only reader is the future
            future.set_exception(error)

    Thread(target=body, daemon=True).start()
    return future


def first_failure(futures: Mapping[str, Future[T]], limit_s: float) -> tuple[str, BaseException] | None:
    """Wait until all are done, one has failed, or ``limit_s`` is over. Returns who failed and how, or None."""
    wait(futures.values(), timeout=limit_s, return_when=FIRST_EXCEPTION)
    for who, future in futures.items():
        error = future.exception() if future.done() else None
        if error is not None:
            return who, error
    late = [who for who, future in futures.items() if not future.done()]
    if late:
        return ", ".join(late), TimeoutError(f"not done within {limit_s:g} s")
    return None
