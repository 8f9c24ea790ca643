"""The driver as a child of whoever launches a run."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from rlx.obs.log import last_phase
from rlx.processes.causes import Cause, Ended, cause_of
from rlx.processes.child_environment import child_variables, inherited_pipe
from rlx.processes.children import Child, ChildSpec, stop_all
from rlx.processes.environment import hidden_gpus
from rlx.processes.rundir import ENDPOINTS, log_path
from rlx.processes.stopping import REQUEUE_STATUS
from rlx.processes.supervisor import now_text

_POLL_S = 0.05


def driver_command(run_dir: Path, endpoints_file: Path, parent_pipe: int, stop_file: Path) -> list[str]:
    """Its command line; MASTER_ADDR and MASTER_PORT in its environment say where the ranks meet, ``stop_file`` asks it to save
    and leave once it is there."""
    driver = [sys.executable, "-m", "rlx.cli.driver", str(run_dir), "--endpoints-file", str(endpoints_file)]
    return [*driver, "--parent-pipe", str(parent_pipe), "--stop-file", str(stop_file)]


def stop_file_of(run_dir: Path, launch_id: str) -> Path:
    """Its presence asks the driver of this launch to save and leave."""
    return run_dir / f".stop-{launch_id}"


class DriverProcess:
    """A driver that this process started and looks after; it ends with this process, however that ends. ``stop_asked`` is
    handed on to it."""

    def __init__(self, run_dir: Path, env: Mapping[str, str], stop_asked: Callable[[], bool]) -> None:
        self._open, self._stop_asked = ExitStack(), stop_asked
        self._stop_file = stop_file_of(run_dir, uuid.uuid4().hex)
        self._open.callback(lambda: self._stop_file.unlink(missing_ok=True))
        pipe = self._open.enter_context(inherited_pipe())
        argv = tuple(driver_command(run_dir, run_dir / ENDPOINTS, pipe, self._stop_file))
        path = log_path(run_dir, "driver", 0)
        spec = ChildSpec(
            role="driver", rank=0, argv=argv, env=child_variables(env) | hidden_gpus("cpu"), log_path=path, pass_fds=(pipe,)
        )
        self.child = Child(spec)
        self._seen_alive = now_text()

    def hand_on_stop(self) -> bool:
        """Ask it to save and leave, once that is wanted; whether that was now."""
        if not self._stop_asked() or self._stop_file.exists():
            return False
        self._stop_file.touch()
        return True

    def failure(self) -> Cause | None:
        """Why it failed, once it has."""
        status = self.child.poll()
        if status is None:
            self._seen_alive = now_text()
        if status is None or status in (0, REQUEUE_STATUS):
            return None
        log, spec = self.child.log_text(), self.child.spec
        return cause_of(
            Ended(
                role=spec.role,
                rank=spec.rank,
                returncode=status,
                seen_alive=self._seen_alive,
                seen_ended=now_text(),
                log=log,
                log_path=spec.log_path,
                phase=last_phase(log),
            )
        )

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
