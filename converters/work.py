"""Files in parallel, with a progress bar. Threads, because reading, writing and copying tensors all let others run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]


def run_all[T](
    title: str, items: Sequence[T], work: Callable[[T, Advance], None], *, num_workers: int, total_bytes: int, done_bytes: int = 0
) -> None:
    """``work(item, advance)`` for all items; ``advance`` takes bytes. The first error stops what has not begun and is raised."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(num_workers) as pool:
        task = progress.add_task(title, total=total_bytes, completed=done_bytes)
        futures = [pool.submit(work, item, lambda count: progress.advance(task, count)) for item in items]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
