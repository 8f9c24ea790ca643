"""What a run keeps: metrics, and checkpoints to go on from. The driver's part of every kind of training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rlx.config.convert import to_tree
from rlx.config.resume import compare
from rlx.config.schema import Config
from rlx.driver.checkpoint import newest_checkpoint, write_checkpoint
from rlx.obs.log import logger, phase
from rlx.obs.metrics import MetricsWriter
from rlx.obs.timers import StepTimer
from rlx.obs.trackers import make_trackers
from rlx.types.rollout import StepReport


class KeptModels(Protocol):
    """The trained models behind all ranks; ``export_hf`` writes the one that users want, ``origin`` says what they began as."""

    def origin(self) -> Mapping[str, object]: ...

    def save(self, path: str) -> None: ...

    def load(self, path: str) -> None: ...

    def export_hf(self, path: str) -> None: ...


class Kept(Protocol):
    """What a run keeps of: its models, and what the driver itself needs to go on."""

    @property
    def num_steps_done(self) -> int: ...

    @property
    def models(self) -> KeptModels: ...

    def state(self) -> Mapping[str, object]:
        """What ``load_state`` needs to go on exactly here (JSON-able)."""

    def load_state(self, state: Mapping[str, object]) -> None: ...


class Keeper:
    """Rows of metrics and checkpoints of one run, inside its ``with`` block."""

    def __init__(self, config: Config, kept: Kept) -> None:
        self._config, self._kept = config, kept
        self._open = ExitStack()
        self._last_saved = 0
        self._since_last_row: dict[str, float] = {}

    def __enter__(self) -> Keeper:
        run_dir = Path(self._config.run.dir)
        with ExitStack() as stack:
            self._writer = stack.enter_context(closing(MetricsWriter(run_dir / "metrics.jsonl")))
            self._trackers = make_trackers(self._config.tracker, run_dir)
            for tracker in self._trackers:
                stack.callback(tracker.close)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint where ``run.resume`` asks for it; metrics after it are dropped."""
        saved = newest_checkpoint(self._config.checkpoints) if self._config.run.resume == "auto" else None
        if saved is not None:
            with phase("resume", saved.step):
                self._kept.models.load(str(saved.folder))
                self._kept.load_state(saved.state)
            logger.info("resumed from %s", saved.folder)
            for change in compare(saved.config, self._config) if saved.config else ():
                logger.info("resumed with %s", change)
        # A run that begins anew measures what it begins with anew.
        self._writer.truncate_after(self._kept.num_steps_done or -1)
        self._about = {"config": to_tree(self._config), "origin": self._kept.models.origin()}
        self._last_saved = self._kept.num_steps_done

    def report(self, step: int, metrics: Mapping[str, float], *more: Mapping[str, float]) -> None:
        """Write one row: ``metrics`` and what was measured beside the step."""
        row = {**metrics, **self._since_last_row}
        for found in more:
            row |= found
        self._since_last_row = {}
        for sink in (self._writer, *self._trackers):
            sink.write(StepReport(step=step, metrics=row))

    def save_if_due(self) -> None:
        """After the step that ``checkpoint.every`` says."""
        every = self._config.checkpoint.every
        if every and self._kept.num_steps_done % every == 0:
            self._save()

    def save_at_end(self, *, done: bool) -> None:
        """What is not saved yet: where ``checkpoint.at_end`` says so, and always when the run is left early."""
        if (self._config.checkpoint.at_end or not done) and self._last_saved != self._kept.num_steps_done:
            self._save()

    def _save(self) -> None:
        step, timer = self._kept.num_steps_done, StepTimer()
        with phase("save", step), timer("save"):
            state = {**self._kept.state(), **self._about}
            write_checkpoint(self._config.checkpoints, step, state, self._kept.models.save, self._config.checkpoint.keep)
        self._since_last_row = {"perf/save_s": timer.metrics()["perf/save_s"]}
        self._last_saved = step
