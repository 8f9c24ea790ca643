"""Where metrics go beside ``metrics.jsonl``: TensorBoard and Weights & Biases, each imported only when asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from rlx.config.schema import TrackerConfig
from rlx.types.rollout import StepReport


class Tracker(Protocol):
    """Takes the rows of a run in order of their steps."""

    def write(self, report: StepReport) -> None: ...

    def close(self) -> None:
        """Write out what is left; nothing is logged afterwards."""


class TensorBoardTracker:
    """Event files in ``folder``. On a resumed run, events at and after the first logged step are hidden by the new ones."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = Path(folder)
        self._make = SummaryWriter
        self._writer: SummaryWriter | None = None

    def write(self, report: StepReport) -> None:
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=report.step)
        for key, value in report.metrics.items():
            self._writer.add_scalar(key, value, report.step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbTracker:
    """A Weights & Biases run named after the run folder. Raises ValueError when the package is not installed."""

    def __init__(self, project: str, run_dir: str | os.PathLike[str]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"tracker.wandb_project: {project!r} needs the package wandb; install it with pip install -e '.[wandb]',"
                " or set the key to null"
            ) from error
        folder = Path(run_dir).resolve()
        self._run = wandb.init(project=project, name=folder.name, dir=str(folder))

    def write(self, report: StepReport) -> None:
        self._run.log(dict(report.metrics), step=report.step)

    def close(self) -> None:
        self._run.finish()


def make_trackers(wanted: TrackerConfig, run_dir: str | os.PathLike[str]) -> list[Tracker]:
    """The trackers that are ``wanted``; raises ValueError naming the key of one that cannot be had."""
    trackers: list[Tracker] = []
    if wanted.wandb_project is not None:
        trackers.append(WandbTracker(wanted.wandb_project, run_dir))
    if wanted.tensorboard:
        trackers.append(TensorBoardTracker(Path(run_dir) / "tensorboard"))
    return trackers
