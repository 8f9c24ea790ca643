"""The driver's part of fine-tuning: wires the model, the examples and the run folder together and runs the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import Config
from rlx.data.examples import Example, ExampleSource
from rlx.data.tokenizer import tokenizer_of
from rlx.driver.finetune import Batches, FinetuneTrainer
from rlx.driver.keeping import evaluate_alone, train
from rlx.driver.lane import CommandLane
from rlx.driver.ranks import parts_of
from rlx.models.hf.fingerprint import origin_of
from rlx.obs.log import logger, phase
from rlx.trainer.commands import (
    Export,
    Load,
    Save,
    ScoreReference,
    Update,
    Validate,
)
from rlx.types.layout import BatchPlan
from rlx.types.rollout import StepReport, UpdateStats
from rlx.types.train_batch import Rows


class RankedModel:
    """TrainedModel over ranks."""

    def __init__(self, lane: CommandLane, config: Config) -> None:
        self._lane, self._config = lane, config
        self._dims = config.parallel.dims(config.num_trainer_ranks)

    def load_batch(self, batch: Rows, plan: BatchPlan) -> None:
        self._lane.ask(parts_of(batch, plan, self._dims))

    def score_reference(self) -> None:
        self._lane.ask(ScoreReference())

    def update(self) -> UpdateStats:
        return self._lane.ask(Update())

    def validate(self) -> Mapping[str, float]:
        return self._lane.ask(Validate())

    def origin(self) -> Mapping[str, object]:
        return origin_of(self._config)

    def save(self, path: str) -> None:
        self._lane.ask(Save(folder=path))

    def load(self, path: str) -> None:
        self._lane.ask(Load(folder=path))

    def export_hf(self, path: str) -> None:
        self._lane.ask(Export(folder=path))


def drive_finetuning(config: Config, lane: CommandLane, *, stop_asked: Callable[[], bool] = lambda: False) -> bool:
    """Train to the end: resume, step, save, export; or only evaluate.

    False when ``stop_asked`` ended it early; what was done is saved.
    """
    batches = Batches(config, config.parallel.dims(config.num_trainer_ranks), RankedModel(lane, config))
    with phase("read examples"):
        tokenizer = tokenizer_of(config)
        held_out = _held_out(config, tokenizer)
    if config.evaluation.only:
        evaluate_alone(config, batches.model, lambda step: batches.validate(held_out, step))
        return True
    with phase("read examples"):
        source = ExampleSource(config.examples_path, config, tokenizer)
    logger.info("%d examples, %d cut, dropped %s", len(source), source.num_truncated, dict(source.drops))

    def complete(row: StepReport) -> StepReport:
        is_due = held_out and config.evaluation.is_due(row.step, config.run.steps)
        return replace(row, metrics={**row.metrics, **batches.validate(held_out, row.step)}) if is_due else row

    return train(config, FinetuneTrainer(config, batches, source), batches.model, stop_asked, complete=complete)


def _held_out(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    if config.evaluation.data is None:
        return []
    return ExampleSource(config.evaluation.data, config, tokenizer).first(config.evaluation.max_prompts)
