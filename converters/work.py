"""Files in parallel, with a progress bar. Threads, because reading, writing and copying tensors all let others run."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]
_NICER = 4  # enough for as many workers as there are cores
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let the C library hand out freed memory again instead of returning it to the system after each tensor.

    Touching fresh pages costs more than all the copying that a conversion does. Elsewhere than on glibc, nothing happens.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**30)):
            set_option(option, value)


def run_all[T](
    title: str, items: Sequence[T], work: Callable[[T, Advance], None], *, num_workers: int, total_bytes: int, done_bytes: int = 0
) -> None:
    """``work(item, advance)`` for all items; ``advance`` takes bytes. The first error stops what has not begun and is raised."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    keep_freed_memory()
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ThreadPoolExecutor(num_workers, initializer=_give_way) as pool,
    ):
        task = progress.add_task(title, total=total_bytes, completed=done_bytes)
        futures = [pool.submit(work, item, lambda count: progress.advance(task, count)) for item in items]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _give_way() -> None:
    """Leave the process that imports Megatron a core of its own: a conversion ends no sooner than it does."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICER)
