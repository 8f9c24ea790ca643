"""The fine-tuning loop: deal examples, score the reference, update. The driver holds examples and plans, never columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from rlx.config.schema import Config
from rlx.data.examples import Example, ExampleSource, plan_examples, to_train_samples
from rlx.obs.log import phase
from rlx.obs.timers import StepTimer
from rlx.types.layout import BatchPlan, ParallelDims
from rlx.types.rollout import StepReport, TrainSample, UpdateStats


class TrainedModel(Protocol):
    """The model and the batch it works on; every call is collective for the ranks behind it."""

    def load_batch(self, samples: Sequence[TrainSample], plan: BatchPlan) -> None: ...

    def score_reference(self) -> None:
        """Compute reference log-probs of the loaded batch."""
        ...

    def update(self) -> UpdateStats:
        """One optimizer step on the loaded batch."""
        ...

    def validate(self) -> Mapping[str, float]:
        """The statistics of the loss on the loaded batch; learns nothing."""
        ...

    def save(self, path: str) -> None: ...

    def load(self, path: str) -> None: ...

    def export_hf(self, path: str) -> None: ...


class FinetuneTrainer:
    """Runs steps; ``held_out`` are the examples to validate on, none for no validation."""

    def __init__(
        self, config: Config, dims: ParallelDims, model: TrainedModel, source: ExampleSource, held_out: Sequence[Example]
    ) -> None:
        self.config, self.dims, self.model, self.source = config, dims, model, source
        self._held_out = list(held_out)
        self.num_steps_done = 0

    def step(self) -> StepReport:
        """One optimizer step."""
        step, timer = self.num_steps_done + 1, StepTimer()
        examples = self.source.next(self.config.finetune.examples_per_step)
        with phase("score", step), timer("score"):
            self._load(examples)
        with phase("update", step), timer("update"):
            stats = self.model.update()
        metrics = _named(stats.means, {"loss": "loss/train", "entropy": "policy/entropy"}, "rewards") | {
            "policy/grad_norm": stats.grad_norm,
            "policy/learning_rate": stats.learning_rate,
            "policy/skipped_steps": float(stats.skipped),
        }
        self.num_steps_done = step
        return StepReport(step=step, metrics=metrics | self._data_metrics(examples, timer))

    def validate(self, row: StepReport) -> StepReport:
        """The row, with the loss on the held-out examples where it is due, and how long that took."""
        if not self._held_out or not self.config.evaluation.is_due(row.step, self.config.run.steps):
            return row
        timer = StepTimer()
        with phase("validate", row.step), timer("validate"):
            self._load(self._held_out)
            found = _named(self.model.validate(), {}, "eval")
        return replace(row, metrics={**row.metrics, **found, "perf/validate_s": timer.metrics()["perf/validate_s"]})

    def state(self) -> dict[str, object]:
        return {"step": self.num_steps_done, "examples": self.source.state(), "seed": self.config.run.seed}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on where ``state`` was taken. ValueError when the run's seed differs: its data order would."""
        if state["seed"] != self.config.run.seed:
            raise ValueError(f"run.seed={self.config.run.seed}, but the checkpoint was made with {state['seed']}")
        self.num_steps_done = int(str(state["step"]))
        examples = state["examples"]
        assert isinstance(examples, Mapping)
        self.source.load_state(examples)

    def _load(self, examples: Sequence[Example]) -> None:
        plan = plan_examples(examples, dims=self.dims, max_tokens=self.config.batching.max_tokens_per_micro_batch)
        self.model.load_batch(to_train_samples(examples), plan)
        if self.config.has_reference:
            self.model.score_reference()

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
