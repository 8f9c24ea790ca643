"""The child's side of "no orphans": notice that the launcher died and end.

The launcher holds the only writing end of a pipe; each child inherits the reading end. Nothing is ever written, so the
end of file means that the launcher is gone, however it died. (``PR_SET_PDEATHSIG`` would do for a child, but says
nothing, is tied to the thread that forked and is not inherited by grandchildren.)
"""

from __future__ import annotations

import os
import signal
import threading

from rlx.obs.log import log_failure


def watch_parent(fd: int) -> None:
    """Start a daemon thread that waits for the end of file on ``fd`` and then ends this process and its children.

    It writes the FAILED line to the log and kills this process's own group when this process leads it; otherwise only itself.
    Call it before anything slow.
    """
    threading.Thread(target=_wait_for_end, args=(fd,), name="watch-parent", daemon=True).start()


def _wait_for_end(fd: int) -> None:
    while os.read(fd, 1):
        pass
    try:
        log_failure(ConnectionAbortedError("the launcher died"))  # to a terminal that may be dead as well
    finally:
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)
