"""What a run keeps: metrics, checkpoints to go on from, the final model. Rank 0's part of every kind of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from rlx.config.convert import to_tree
from rlx.config.resume import compare
from rlx.config.schema import CheckpointConfig, Config
from rlx.driver.checkpoint import SavedRun, newest_checkpoint, write_checkpoint
from rlx.obs.log import logger, notice, phase
from rlx.obs.metrics import MetricsWriter
from rlx.obs.timers import StepTimer
from rlx.obs.trackers import make_trackers
from rlx.types.rollout import StepReport


class Trainer(Protocol):
    """Something that learns step by step; ``state`` / ``load_state`` are what a checkpoint keeps of the driver."""

    num_steps_done: int

    def step(self) -> StepReport: ...

    def state(self) -> dict[str, object]: ...

    def load_state(self, state: Mapping[str, object]) -> None: ...


class KeptModels(Protocol):
    """The trained models behind all ranks; ``export_hf`` writes the one that users want, ``origin`` says what they began as."""

    def origin(self) -> Mapping[str, object]: ...

    def save(self, path: str) -> None: ...

    def load(self, path: str) -> None: ...

    def export_hf(self, path: str) -> None: ...


def train(
    config: Config,
    trainer: Trainer,
    models: KeptModels,
    stop_asked: Callable[[], bool],
    *,
    begin: Callable[[], None] = lambda: None,
    complete: Callable[[StepReport], StepReport] = lambda row: row,
) -> bool:
    """To the end: resume, begin, iterate, save, export. ``begin`` is called once the weights to start from are there;
    ``complete`` adds to a row of metrics what the trainer itself does not know: evaluation, where it is due. False when
    ``stop_asked`` ended it early; what was done is saved."""
    run_dir = Path(config.run.dir)
    with ExitStack() as stack:
        writer = stack.enter_context(closing(MetricsWriter(run_dir / "metrics.jsonl")))
        trackers = make_trackers(config, run_dir)
        for tracker in trackers:
            stack.callback(tracker.close)
        _resume(config, trainer, models, writer)
        about = {"config": to_tree(config), "origin": models.origin()}
        since_last_row: dict[str, float] = {}

        def report(row: StepReport) -> None:
            row = complete(replace(row, metrics={**row.metrics, **since_last_row}))
            since_last_row.clear()
            for sink in (writer, *trackers):
                sink.write(row)

        def save() -> None:
            timer = StepTimer()
            with phase("save", trainer.num_steps_done), timer("save"):
                state = {**trainer.state(), **about}
                write_checkpoint(config.checkpoints, trainer.num_steps_done, state, models.save, config.checkpoint.keep)
            since_last_row["perf/save_s"] = timer.metrics()["perf/save_s"]

        begin()
        if config.evaluation.at_start and trainer.num_steps_done == 0:
            report(StepReport(step=0, metrics={}))
        iterate(
            trainer,
            num_steps=config.run.steps,
            report=report,
            save=save,
            checkpoint=config.checkpoint,
            stop_asked=stop_asked,
        )
        done = trainer.num_steps_done >= config.run.steps
        if done and config.run.export_hf:
            models.export_hf(str(run_dir / "hf"))
        return done


def _resume(config: Config, trainer: Trainer, models: KeptModels, writer: MetricsWriter) -> None:
    """Go on from the newest whole checkpoint where ``run.resume`` asks for it; metrics after it are dropped."""
    saved = _newest(config)
    if saved is not None:
        with phase("resume", saved.step):
            models.load(str(saved.folder))
            trainer.load_state(saved.state)
        logger.info("resumed from %s", saved.folder)
        for change in compare(saved.config, config) if saved.config else ():
            logger.info("resumed with %s", change)
    # A run that begins anew measures what it begins with anew.
    writer.truncate_after(trainer.num_steps_done or -1)


def evaluate_alone(config: Config, models: KeptModels, measure: Callable[[int], Mapping[str, float]]) -> None:
    """Append one row to metrics.jsonl: ``measure(step)`` of the newest checkpoint where ``run.resume`` asks for it, else of
    the model that training would start from (step 0)."""
    saved = _newest(config)
    if saved is not None:
        with phase("load checkpoint", saved.step):
            models.load(str(saved.folder))
    notice(f"evaluating {saved.folder if saved else config.model.path}")
    step = saved.step if saved else 0
    with closing(MetricsWriter(Path(config.run.dir) / "metrics.jsonl", in_order=False)) as writer:
        writer.write(StepReport(step=step, metrics=measure(step)))


def _newest(config: Config) -> SavedRun | None:
    """The newest whole checkpoint, where ``run.resume`` asks for it and there is one."""
    return newest_checkpoint(config.checkpoints) if config.run.resume == "auto" else None


def iterate(
    trainer: Trainer,
    *,
    num_steps: int,
    report: Callable[[StepReport], None],
    save: Callable[[], None],
    checkpoint: CheckpointConfig,
    stop_asked: Callable[[], bool],
) -> None:
    """Step to ``num_steps`` (counting those done before a resume), saving as ``checkpoint`` says.

    Once ``stop_asked`` says so it saves and returns after the step that is under way.
    """
    saved = trainer.num_steps_done
    while trainer.num_steps_done < num_steps and not stop_asked():
        with phase("step", trainer.num_steps_done + 1):
            report(trainer.step())
        if checkpoint.every and trainer.num_steps_done % checkpoint.every == 0:
            save()
            saved = trainer.num_steps_done
    if (checkpoint.at_end or trainer.num_steps_done < num_steps) and saved != trainer.num_steps_done:
        save()
