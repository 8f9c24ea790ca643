"""The child's side of "no orphans": notice that the launcher died and end.

The launcher holds the only writing end of a pipe; each child inherits the reading end. Nothing is ever written, so the
end of file means that the launcher is gone, however it died. (``PR_SET_PDEATHSIG`` would do for a child, but says
nothing, is tied to the thread that forked and is not inherited by grandchildren.)
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from rlx.obs.log import log_failure, logger


def watch_parent(fd: int, on_death: Callable[[], None] | None = None, *, terminal_fd: int | None = None) -> threading.Thread:
    """Start a daemon thread that waits for the end of file on ``fd`` and then ends this process and its children.

    It writes the FAILED line to the log (and one line to ``terminal_fd``), calls ``on_death`` and kills this process's
    own group when this process leads it; otherwise only itself. Call it before anything slow.
    """
    thread = threading.Thread(target=_wait_for_end, args=(fd, on_death, terminal_fd), name="watch-parent", daemon=True)
    thread.start()
    return thread


def _wait_for_end(fd: int, on_death: Callable[[], None] | None, terminal_fd: int | None) -> None:
    while os.read(fd, 1):
        pass
    try:
        log_failure(ConnectionAbortedError("the launcher died"))
        if terminal_fd is not None:
            os.write(terminal_fd, b"rlx: FAILED launcher died\n")
        if on_death is not None:
            on_death()
    except Exception:
        # Whatever a dead terminal or the callback raises, the process must still end.
        logger.exception("while ending after the launcher's death")
    finally:
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)
