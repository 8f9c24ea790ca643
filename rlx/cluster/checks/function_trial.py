"""Importing a file of the user's for the first time, in a process of its own: what it does there ends or holds no command.

``python -m rlx.cluster.checks.function_trial KEY NAME FD`` is that process. It writes a byte to the pipe FD once the import has
come to its end, well or by an error, and ends at once: an exit status alone would prove nothing, for the file may have set it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

from rlx.config.user_function import UserFunction

LIMIT_S = 60.0
"""A file that imports torch and transformers off a slow disk needs most of it."""


def trial_problems(functions: Iterable[tuple[str, str]], limit_s: float = LIMIT_S) -> Iterator[str]:
    """Why files cannot be imported in this process, of (key, ``path/to/file.py:function``): they would end it or hold it up. What
    ``UserFunction`` raises for a file is no concern of this."""
    tried = set()
    for key, name in functions:
        path = name.rpartition(":")[0]
        if path not in tried and os.path.isfile(path):
            tried.add(path)
            problem = _tried(key, name, limit_s)
            if problem is not None:
                yield f"{key}: {path}: {problem}"


def _tried(key: str, name: str, limit_s: float) -> str | None:
    reading, writing = os.pipe()
    try:
        # A session of its own, so that whatever the file starts ends with it.
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, key, name, str(writing)],
            pass_fds=(writing,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # the file says it again when it is imported in earnest
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"importing it took more than {limit_s:g} s; what takes long belongs into the function"
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.set_blocking(reading, False)
        with suppress(BlockingIOError):
            if os.read(reading, 1):
                return None
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        return f"importing it ended the process {how}; it must be a file that can be imported"
    finally:
        os.close(reading)
        os.close(writing)


def _try(key: str, name: str, writing: int) -> None:
    with suppress(ValueError):
        UserFunction(key, name)
    os.write(writing, b".")
    os._exit(0)  # threads that it left running are nobody's concern


if __name__ == "__main__":
    _try(sys.argv[1], sys.argv[2], int(sys.argv[3]))
