"""The driver as a child of whoever launches a run."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from rlx.processes.causes import Cause, cause_of
from rlx.processes.child_environment import child_variables, inherited_pipe
from rlx.processes.children import Child, ChildSpec, stop_all
from rlx.processes.environment import hidden_gpus
from rlx.processes.rundir import ENDPOINTS, log_path
from rlx.processes.stopping import REQUEUE_STATUS
from rlx.processes.supervisor import Exit, ended, now_text

_POLL_S = 0.05


def driver_command(run_dir: Path, endpoints_file: Path, parent_pipe: int, stop_file: Path) -> list[str]:
    """Its command line; MASTER_ADDR and MASTER_PORT in its environment say where the ranks meet, ``stop_file`` asks it to save
    and leave once it is there."""
    driver = [sys.executable, "-m", "rlx.cli.driver", str(run_dir), "--endpoints-file", str(endpoints_file)]
    return [*driver, "--parent-pipe", str(parent_pipe), "--stop-file", str(stop_file)]


class StopFile:
    """Its presence at ``path`` asks the driver of one launch to save and leave, once ``stop_asked``."""

    def __init__(self, run_dir: Path, stop_asked: Callable[[], bool]) -> None:
        self.path = run_dir / f".stop-{uuid.uuid4().hex}"
        self._stop_asked = stop_asked

    def hand_on(self) -> bool:
        """Ask, once that is wanted; whether that was now."""
        if not self._stop_asked() or self.path.exists():
            return False
        self.path.touch()
        return True

    def remove(self) -> None:
        """The launch is over."""
        self.path.unlink(missing_ok=True)


class DriverProcess:
    """A driver that this process started and looks after; it ends with this process, however that ends. ``stop_asked`` is
    handed on to it."""

    def __init__(self, run_dir: Path, env: Mapping[str, str], stop_asked: Callable[[], bool]) -> None:
        self._open, self.stop_file = ExitStack(), StopFile(run_dir, stop_asked)
        self._open.callback(self.stop_file.remove)
        pipe = self._open.enter_context(inherited_pipe())
        argv = tuple(driver_command(run_dir, run_dir / ENDPOINTS, pipe, self.stop_file.path))
        path = log_path(run_dir, "driver", 0)
        spec = ChildSpec(
            role="driver", rank=0, argv=argv, env=child_variables(env) | hidden_gpus("cpu"), log_path=path, pass_fds=(pipe,)
        )
        self.child = Child(spec)
        self._seen_alive = now_text()

    def failure(self) -> Cause | None:
        """Why it failed, once it has."""
        status = self.child.poll()
        if status is None:
            self._seen_alive = now_text()
        if status is None or status in (0, REQUEUE_STATUS):
            return None
        return cause_of(ended(self.child, Exit(status, self._seen_alive, now_text())))

    def ended(self, timeout_s: float) -> Cause | None:
        """Wait for its end; why it failed, None when it ended well or not within the time."""
        deadline = time.monotonic() + timeout_s
        while self.child.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return self.failure()

    def stop(self) -> None:
        """End it, if it still runs."""
        stop_all([self.child])
        self._open.close()
