"""Ports for tests: each is this process's own until it ends, whatever other tests run beside it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from rlx.sync import ports

_FOLDER = Path(tempfile.gettempdir()) / f"rlx-test-ports-{os.getuid()}"
_HELD: list[int] = []


def free_port() -> int:
    _FOLDER.mkdir(exist_ok=True)
    while True:
        port = ports.free_port()
        lock = os.open(_FOLDER / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _HELD.append(lock)
        return port
