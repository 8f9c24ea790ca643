"""A job that this process launches, here or on Ray: its folder opened, the job watched to its end, its outcome told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlx.cluster.progress import Progress
from rlx.config.load import dump_config
from rlx.config.schema import Config
from rlx.processes.causes import Cause, shown_log, where
from rlx.processes.interrupts import Interrupts
from rlx.processes.rundir import open_run_dir
from rlx.processes.stopping import REQUEUE_STATUS
from rlx.processes.supervisor import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRun:
    """A run whose folder is ours: what its user sees and asks for, and how long any one wait between processes may last."""

    run_dir: Path
    progress: Progress
    interrupts: Interrupts
    failure_timeout_s: float


class Launch(Protocol):
    """The processes of one run, from start to stop."""

    def run(self) -> Outcome:
        """Start everything and watch until it is over."""

    def stop(self) -> str:
        """End all of them; what could not be ended, in words."""

    @property
    def described(self) -> str:
        """What was started, in words, where there is a word for it."""

    def log_of(self, cause: Cause) -> str:
        """What the one to blame wrote."""

    def host_of(self, cause: Cause) -> str | None:
        """Where the one to blame ran, if that is not clear."""


def run_job(config: Config, make: Callable[[OpenRun], Launch]) -> int:
    """Run the whole job and report on stdout and stderr. Must be called in the main thread.

    Returns 0 when the training is done, 75 when SIGUSR1 or SIGTERM asked to save and leave, 1 after a failure (its cause is in
    the last lines of stderr), 128 + N after signal N. Raises ConfigError, with nothing started, when the run folder cannot be
    used, or the settings with what is here. No process outlives it.
    """
    evaluates = config.evaluation.only
    with open_run_dir(config.run, evaluates=evaluates) as run_dir, Interrupts(saves=not evaluates) as interrupts:
        (run_dir / "config.yaml").write_text(dump_config(config))
        progress = Progress(run_dir, total_steps=config.run.steps)
        limit_s = config.run.failure_timeout_s
        launch = make(OpenRun(run_dir=run_dir, progress=progress, interrupts=interrupts, failure_timeout_s=limit_s))
        try:
            outcome = launch.run()
        finally:
            left = launch.stop()
            progress.close()
        if left:
            print(f"rlx: could not end processes {left}", file=sys.stderr)
        if outcome.cause is not None:
            print(_failure_text(outcome.cause, launch), file=sys.stderr, flush=True)
            return 1
        if outcome.interrupted:
            stopped = f"stopped {launch.described}".rstrip()
            print(f"rlx: {interrupts.name}: {stopped}; run folder: {run_dir}", file=sys.stderr, flush=True)
            return interrupts.status
        if outcome.left_early:
            print(f"rlx: {interrupts.name} asked to save and leave; run.resume=auto goes on", flush=True)
            return REQUEUE_STATUS
        print(progress.summary(), flush=True)
        return 0


def _failure_text(cause: Cause, launch: Launch) -> str:
    host = launch.host_of(cause)
    on = "" if host is None else f" on {host}"
    lines = [f"rlx: FAILED {cause.role} rank {cause.rank}{on} {where(cause.phase)}", f"rlx: cause: {cause.cause}"]
    return "\n".join([*shown_log(cause, launch.log_of(cause)), *lines, f"rlx: logs: {cause.log_path}"])
