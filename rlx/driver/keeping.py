"""What a run keeps: metrics, checkpoints to go on from, the final model. Rank 0's part of every kind of training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

from rlx.config.schema import Config
from rlx.driver.checkpoint import read_driver_state, whole_checkpoints, write_checkpoint
from rlx.driver.loop import Trainer, iterate
from rlx.obs.log import logger, phase
from rlx.obs.metrics import MetricsWriter
from rlx.obs.trackers import make_trackers
from rlx.types.rollout import StepReport


class KeptModels(Protocol):
    """The trained models behind all ranks; ``export_hf`` writes the one that users want."""

    def save(self, path: str) -> None: ...

    def load(self, path: str) -> None: ...

    def export_hf(self, path: str) -> None: ...


def train(
    config: Config,
    trainer: Trainer,
    models: KeptModels,
    stop_asked: Callable[[], bool],
    *,
    loop: Callable[..., None] = iterate,
    complete: Callable[[StepReport], StepReport] = lambda row: row,
) -> bool:
    """To the end: resume, iterate, save, export. ``loop`` is called as ``iterate`` is; ``complete`` adds what the trainer itself
    does not know to a row of metrics. False when ``stop_asked`` ended it early; what was done is saved."""
    run_dir = Path(config.run.dir)
    with ExitStack() as stack:
        writer = stack.enter_context(closing(MetricsWriter(run_dir / "metrics.jsonl")))
        trackers = make_trackers(config, run_dir)
        for tracker in trackers:
            stack.callback(tracker.close)
        _resume(config, trainer, models, writer)

        def report(row: StepReport) -> None:
            row = complete(row)
            for sink in (writer, *trackers):
                sink.write(row)

        loop(
            trainer,
            num_steps=config.run.steps,
            report=report,
            save=lambda: _save(config, trainer, models),
            checkpoint=config.checkpoint,
            stop_asked=stop_asked,
        )
        done = trainer.num_steps_done >= config.run.steps
        if done and config.run.export_hf:
            models.export_hf(str(run_dir / "hf"))
        return done


def _resume(config: Config, trainer: Trainer, models: KeptModels, writer: MetricsWriter) -> None:
    """Go on from the newest whole checkpoint where ``run.resume`` asks for it; metrics after it are dropped."""
    found = whole_checkpoints(_folder(config)) if config.run.resume == "auto" else []
    if found:
        step, folder = found[-1]
        with phase("resume", step):
            models.load(str(folder))
            trainer.load_state(read_driver_state(folder))
        logger.info("resumed from %s", folder)
    writer.truncate_after(trainer.num_steps_done)


def _save(config: Config, trainer: Trainer, models: KeptModels) -> None:
    """Write a checkpoint of the present step."""
    with phase("save", trainer.num_steps_done):
        write_checkpoint(_folder(config), trainer.num_steps_done, trainer.state(), models.save, config.checkpoint.keep)


def _folder(config: Config) -> Path:
    return Path(config.run.dir) / "checkpoints"
