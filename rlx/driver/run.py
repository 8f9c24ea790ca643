"""The run on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Protocol

from rlx.config.schema import Config
from rlx.driver.checkpoint import newest_checkpoint
from rlx.driver.keeping import Keeper, Kept, KeptModels
from rlx.obs.log import notice, phase
from rlx.obs.metrics import MetricsWriter
from rlx.types.rollout import StepReport


class Job(Kept, Protocol):
    """What a run runs: reinforcement or fine-tuning."""

    def begin(self) -> None:
        """The weights to start (or go on) from are there: bring the engines to them, where there are any."""

    def step(self) -> StepReport:
        """A batch, what is learnt from it, and its publication."""

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Metrics of the present weights on what is held out; nothing where nothing is."""

    def counts(self) -> Mapping[str, float]:
        """What else belongs into the row of a step: what went wrong and was made good, memory."""


def run(config: Config, job: Job, *, stop_asked: Callable[[], bool] = lambda: False) -> bool:
    """To the end of ``run.steps``; False when ``stop_asked`` ended it early. What was done is saved either way."""
    with Keeper(config, job) as keeper:
        keeper.resume()
        job.begin()
        if config.evaluation.at_start and job.num_steps_done == 0:
            keeper.report(0, {}, job.evaluate(0), job.counts())
        while job.num_steps_done < config.run.steps and not stop_asked():
            with phase("step", job.num_steps_done + 1):
                row = job.step()
                is_due = config.evaluation.is_due(row.step, config.run.steps)
                found = job.evaluate(row.step) if is_due else {}
                keeper.report(row.step, row.metrics, found, job.counts())
            keeper.save_if_due()
        done = job.num_steps_done >= config.run.steps
        keeper.save_at_end(done=done)
        if done and config.run.export_hf:
            job.models.export_hf(str(Path(config.run.dir) / "hf"))
        return done


def evaluate_alone(config: Config, models: KeptModels, measure: Callable[[int], Mapping[str, float]]) -> bool:
    """Append one row to metrics.jsonl: ``measure(step)`` of the newest checkpoint where ``run.resume`` asks for it, else of
    the model that training would start from (step 0). True: it is done."""
    saved = newest_checkpoint(config.checkpoints) if config.run.resume == "auto" else None
    if saved is not None:
        with phase("load checkpoint", saved.step):
            models.load(str(saved.folder))
    notice(f"evaluating {saved.folder if saved else config.model.path}")
    step = saved.step if saved else 0
    with closing(MetricsWriter(Path(config.run.dir) / "metrics.jsonl", in_order=False)) as writer:
        writer.write(StepReport(step=step, metrics=measure(step)))
    return True
