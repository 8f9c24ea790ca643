"""The trained models behind all ranks: the Protocols of ``driver.roles`` as commands over the lane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from rlx.data.plan import part_of
from rlx.driver.lane import CommandLane, Parts
from rlx.trainer.commands import (
    ComputeAdvantages,
    Export,
    Load,
    LoadBatch,
    Save,
    ScoreCritic,
    ScorePolicy,
    ScoreReference,
    UpdateCritic,
    UpdatePolicy,
)
from rlx.types.layout import BatchPlan, ParallelDims
from rlx.types.rollout import UpdateStats
from rlx.types.train_batch import Rows
from rlx.types.weights import WeightManifest


class Engines(Protocol):
    """How weights reach the engines, and how those that share the trainers' devices take turns with them."""

    def publish(self, version: int) -> WeightManifest: ...

    def begin_training(self) -> None: ...

    def room(self) -> AbstractContextManager[None]:
        """Everything of the trainers is on its device inside."""


def parts_of(batch: Rows, plan: BatchPlan, dims: ParallelDims) -> Parts[None]:
    """The command that hands every rank its own rows of a batch."""
    return Parts(lambda dp_rank: LoadBatch(part=part_of(batch, plan, dp_rank)), dims.dp_rank_of)


class RankedModels:
    """What the policy of reinforcement and the model of fine-tuning have in common: a batch, and what is kept. ``origin`` says
    what the run's models began as."""

    def __init__(self, lane: CommandLane, dims: ParallelDims, origin: Callable[[], Mapping[str, object]]) -> None:
        self._lane, self._dims, self.origin = lane, dims, origin

    def load_batch(self, batch: Rows, plan: BatchPlan) -> None:
        self._lane.ask(parts_of(batch, plan, self._dims))

    def save(self, path: str) -> None:
        with self._room():
            self._lane.ask(Save(folder=path))

    def load(self, path: str) -> None:
        self._lane.ask(Load(folder=path))

    def export_hf(self, path: str) -> None:
        with self._room():
            self._lane.ask(Export(folder=path))

    def _room(self) -> AbstractContextManager[None]:
        """Everything of the trainers is on its device inside."""
        return nullcontext()


class RankedPolicy(RankedModels):
    """PolicyGroup over ranks. ``engines`` None: there are none."""

    def __init__(
        self, lane: CommandLane, engines: Engines | None, dims: ParallelDims, origin: Callable[[], Mapping[str, object]]
    ) -> None:
        super().__init__(lane, dims, origin)
        self._engines = engines

    def begin_training(self) -> None:
        if self._engines is not None:
            self._engines.begin_training()

    def score(self) -> Mapping[str, float]:
        return self._lane.ask(ScorePolicy())

    def compute_advantages(self, kl_coefficient: float) -> Mapping[str, float]:
        return self._lane.ask(ComputeAdvantages(kl_coefficient=kl_coefficient))

    def update(self, mini_batch: int) -> UpdateStats:
        return self._lane.ask(UpdatePolicy(mini_batch=mini_batch))

    def publish(self, version: int) -> WeightManifest | None:
        return None if self._engines is None else self._engines.publish(version)

    def _room(self) -> AbstractContextManager[None]:
        return nullcontext() if self._engines is None else self._engines.room()


class RankedCritic:
    """CriticGroup over ranks."""

    def __init__(self, lane: CommandLane) -> None:
        self._lane = lane

    def score(self) -> Mapping[str, float]:
        return self._lane.ask(ScoreCritic())

    def update(self, mini_batch: int) -> UpdateStats:
        return self._lane.ask(UpdateCritic(mini_batch=mini_batch))


class RankedReference:
    """ReferenceGroup over ranks."""

    def __init__(self, lane: CommandLane) -> None:
        self._lane = lane

    def score(self) -> Mapping[str, float]:
        return self._lane.ask(ScoreReference())
