"""Fine-tuning: examples are dealt, the reference scores, the model is updated; and how all of that is put together.

The driver holds examples and plans, never columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from rlx.config.parts import loaded_models
from rlx.config.schema import Config
from rlx.data.examples import Example, ExampleReader, ExampleSource, plan_examples, to_train_batch
from rlx.data.images.pixels import image_folder
from rlx.data.images.reader import image_reader
from rlx.data.plan import Budget
from rlx.data.tokenizer import tokenizer_of
from rlx.driver.keeping import KeptModels
from rlx.driver.lane import CommandLane
from rlx.driver.ranks import RankedModels
from rlx.driver.run import evaluate_alone, run
from rlx.models.hf.fingerprint import origin_of
from rlx.obs.log import logger, phase
from rlx.obs.timers import StepTimer
from rlx.trainer.commands import (
    ScoreReference,
    Update,
    Validate,
)
from rlx.types.layout import BatchPlan, ParallelDims
from rlx.types.rollout import StepReport, UpdateStats
from rlx.types.train_batch import Rows


class TrainedModel(KeptModels, Protocol):
    """The model and the batch it works on; every call is collective for the ranks behind it."""

    def load_batch(self, batch: Rows, plan: BatchPlan) -> None: ...

    def score_reference(self) -> None:
        """Compute reference log-probs of the loaded batch."""

    def update(self) -> UpdateStats:
        """One optimizer step on the loaded batch."""

    def validate(self) -> Mapping[str, float]:
        """The statistics of the loss on the loaded batch; learns nothing."""


class Batches:
    """Lays examples out on the ranks and lets the reference score them, where there is one."""

    def __init__(self, model: TrainedModel, dims: ParallelDims, *, budget: Budget, has_reference: bool) -> None:
        self.model, self._dims, self._budget, self._has_reference = model, dims, budget, has_reference

    def load(self, examples: Sequence[Example]) -> None:
        self.model.load_batch(to_train_batch(examples), plan_examples(examples, dims=self._dims, budget=self._budget))
        if self._has_reference:
            self.model.score_reference()

    def validate(self, examples: Sequence[Example], step: int) -> dict[str, float]:
        """The loss on these examples and what belongs to it, ``eval/...``, and how long that took."""
        timer = StepTimer()
        with phase("validate", step), timer("validate"):
            self.load(examples)
            found = _named(self.model.validate(), {}, "eval")
        return found | {"perf/validate_s": timer.metrics()["perf/validate_s"]}


class FinetuneTrainer:
    """Fine-tuning as a job: steps of ``examples_per_step``, validated on ``held_out``. ``seed`` is the run's."""

    def __init__(
        self, batches: Batches, source: ExampleSource, held_out: Sequence[Example], examples_per_step: int, seed: int
    ) -> None:
        self.batches, self.source, self._held_out = batches, source, held_out
        self._examples_per_step, self._seed = examples_per_step, seed
        self.models: KeptModels = batches.model
        self.num_steps_done = 0

    def begin(self) -> None:
        """No engine waits for weights."""

    def step(self) -> StepReport:
        """One optimizer step."""
        step, timer = self.num_steps_done + 1, StepTimer()
        examples = self.source.next(self._examples_per_step)
        with phase("score", step), timer("score"):
            self.batches.load(examples)
        with phase("update", step), timer("update"):
            stats = self.batches.model.update()
        metrics = _named(stats.means, {"loss": "loss/train", "entropy": "policy/entropy"}, "rewards") | {
            "policy/grad_norm": stats.grad_norm,
            "policy/learning_rate": stats.learning_rate,
            "policy/skipped_steps": float(stats.skipped),
        }
        self.num_steps_done = step
        return StepReport(step=step, metrics=metrics | self._data_metrics(examples, timer))

    def evaluate(self, step: int) -> Mapping[str, float]:
        return self.batches.validate(self._held_out, step) if self._held_out else {}

    def counts(self) -> Mapping[str, float]:
        return {}

    def state(self) -> dict[str, object]:
        return {"step": self.num_steps_done, "examples": self.source.state(), "seed": self._seed}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on where ``state`` was taken. ValueError when the run's seed differs: its data order would."""
        if state["seed"] != self._seed:
            raise ValueError(f"run.seed={self._seed}, but the checkpoint was made with {state['seed']}")
        self.num_steps_done = int(str(state["step"]))
        examples = state["examples"]
        assert isinstance(examples, Mapping)
        self.source.load_state(examples)

    def _data_metrics(self, examples: Sequence[Example], timer: StepTimer) -> dict[str, float]:
        perf = timer.metrics()
        num_tokens = sum(len(side.token_ids) for example in examples for side in example)
        return {
            "data/epochs": self.source.epochs,
            "data/tokens_mean": num_tokens / sum(len(example) for example in examples),
            "data/truncated": float(self.source.num_truncated),
            **{f"drops/{reason}": float(count) for reason, count in self.source.drops.items()},
            **perf,
            "perf/tokens_per_s": num_tokens / max(perf["perf/step_s"], 1e-9),
        }


def _named(means: Mapping[str, float], names: Mapping[str, str], otherwise: str) -> dict[str, float]:
    """The loss's statistics under the names of metrics."""
    return {names.get(stat, f"{otherwise}/{stat}"): value for stat, value in means.items()}


class RankedModel(RankedModels):
    """TrainedModel over ranks."""

    def score_reference(self) -> None:
        self._lane.ask(ScoreReference())

    def update(self) -> UpdateStats:
        return self._lane.ask(Update())

    def validate(self) -> Mapping[str, float]:
        return self._lane.ask(Validate())


def drive_finetuning(config: Config, lane: CommandLane, *, stop_asked: Callable[[], bool]) -> bool:
    """Train to the end: resume, step, save, export; or only evaluate.

    False when ``stop_asked`` ended it early; what was done is saved.
    """
    dims, budget = config.parallel.dims(config.num_trainer_ranks), Budget.of(config.model, config.parallel, config.batching)
    with phase("read examples"):
        tokenizer = tokenizer_of(config.model, config.data)
        images = image_reader(config.model.path, config.data, tokenizer, image_folder(config.run.dir))
        reader = ExampleReader(data=config.data, finetune=config.finetune, tokenizer=tokenizer, images=images)
        held_out: list[Example] = []
        if config.evaluation.data is not None:
            held_out = ExampleSource(config.evaluation.data, reader, config.run.seed).first(config.evaluation.max_prompts)
    model = RankedModel(lane, dims, partial(origin_of, loaded_models(config), tokenizer))
    batches = Batches(model, dims, budget=budget, has_reference=config.has_reference)
    if config.evaluation.only:
        return evaluate_alone(config, model, lambda step: batches.validate(held_out, step))
    with phase("read examples"):
        source = ExampleSource(config.examples_path, reader, config.run.seed)
    logger.info("%d examples, %d cut, dropped %s", len(source), source.num_truncated, dict(source.drops))
    trainer = FinetuneTrainer(batches, source, held_out, config.finetune.examples_per_step, config.run.seed)
    return run(config, trainer, stop_asked=stop_asked)
