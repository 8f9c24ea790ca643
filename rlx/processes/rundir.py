"""The run folder: may this launch write there, and what must go first."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from rlx.config.load import ConfigError
from rlx.config.schema import RunConfig

ENDPOINTS = "engines.json"
_SHARED_S = 60.0
_OURS = ("metrics.jsonl", "checkpoints", "hf", "tensorboard", "logs", "config.yaml", "sync", "engines", "report.html", "eval")


def log_path(run_dir: Path, role: str, rank: int, node: int = 0) -> Path:
    """``RUN_DIR/logs/ROLE-RANK.log``; of the further nodes of an engine that has several ``ROLE-RANK-nodeNODE.log``."""
    return run_dir / "logs" / (f"{role}-{rank}-node{node}.log" if node else f"{role}-{rank}.log")


def check_run_dir(run: RunConfig, *, evaluates: bool) -> None:
    """Change nothing; ConfigError when the folder holds a run that this launch, of an evaluation alone where it ``evaluates``,
    would write over or mix with."""
    run_dir = Path(run.dir)
    begins_anew = run.resume == "never" and not run.overwrite and not evaluates
    if begins_anew and (run_dir / "metrics.jsonl").exists():
        raise ConfigError(
            [
                f"run.dir: {run_dir} already holds a run (metrics.jsonl); take another run.dir,"
                " go on from its newest checkpoint with run.resume=auto, or replace it with run.overwrite=true"
            ]
        )


def check_place(key: str, folder: str | Path) -> None:
    """ConfigError when ``folder`` cannot be written to or, where it is not there, be made. Leaves nothing behind."""
    try:
        with TemporaryFile(dir=_nearest(Path(folder).absolute())):
            pass
    except OSError as error:
        raise ConfigError([f"{key}: cannot write to {folder}: {error.strerror or error}"]) from error


def _nearest(place: Path) -> Path:
    """``place`` or the nearest folder above it that is there; OSError for a file in the way, or a name that cannot be one."""
    while True:
        try:
            os.lstat(place)
            return place
        except FileNotFoundError:
            place = place.parent


@contextmanager
def open_run_dir(run: RunConfig, *, evaluates: bool) -> Iterator[Path]:
    """Make the folder, keep other launchers out until the end, remove an old run where asked to.

    Yields its absolute path. ConfigError as ``check_run_dir``, or when another launcher is at work there.
    """
    check_run_dir(run, evaluates=evaluates)
    run_dir = Path(run.dir).resolve()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # A lock on an open file goes with its process, however that ends.
        lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError([f"run.dir: cannot write to {run_dir}: {error.strerror or error}"]) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                [f"run.dir: another launcher is at work in {run_dir}; wait for it or take another run.dir"]
            ) from None
        if run.overwrite:
            for path in (*(run_dir / name for name in _OURS), *run_dir.glob("hf-step-*")):
                _remove(path)
        for announced in (run_dir / ENDPOINTS, *run_dir.glob("engines-*.json"), run_dir / "engines"):
            _remove(announced)
        (run_dir / "logs").mkdir(exist_ok=True)
        yield run_dir
    finally:
        os.close(lock)


def wait_for_shared(path: Path) -> None:
    """Network file systems show another node's new file after a while. FileNotFoundError when it does not come."""
    deadline = time.monotonic() + _SHARED_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{path}: another node made it, but host {socket.gethostname()} does not see it after {_SHARED_S:g} s:"
                " run.dir must be on a file system that all nodes share"
            )
        time.sleep(0.2)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
