"""What the driver may ask of the trainer ranks: one frozen dataclass a command, with the type of its answer.

Every rank runs the same command at the same time, so whatever is collective inside meets its peers; ``LoadBatch`` alone holds
something else on each data-parallel rank. ``None`` is the answer of a rank that does not know (only a pipeline's last stage has
losses); the driver takes the first that is another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlx.sync.errors import SyncFailure
from rlx.sync.group import Endpoint
from rlx.types.rollout import UpdateStats
from rlx.types.train_batch import BatchPart
from rlx.types.weights import WeightManifest

if TYPE_CHECKING:  # the driver gives commands without the models' libraries
    from rlx.trainer.finetune_worker import FinetuneWorker
    from rlx.trainer.rank_worker import RankWorker
    from rlx.trainer.worker import Worker

Means = Mapping[str, float]


class Command[W, A](ABC):
    """Something that a worker ``W`` does and answers with an ``A``. ``title`` is the phase that a rank is in meanwhile."""

    title: str

    @abstractmethod
    def run(self, worker: W) -> A | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBatch(Command["RankWorker", None]):
    """Hold this part of a batch until the next one. Every data-parallel rank gets its own."""

    title = "load batch"
    part: BatchPart

    def __getstate__(self) -> tuple[BatchPart]:
        """A dataclass's own looks up its fields each time, and this goes to every rank by itself."""
        return (self.part,)

    def run(self, worker: RankWorker) -> None:
        worker.load_batch(self.part)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReference(Command["RankWorker", Means]):
    title = "score reference"

    def run(self, worker: RankWorker) -> Means | None:
        return worker.score_reference()


@dataclass(frozen=True, slots=True, kw_only=True)
class Save(Command["RankWorker", None]):
    """Write every trained model below ``folder``."""

    title = "save"
    folder: str

    def run(self, worker: RankWorker) -> None:
        worker.save(self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Command["RankWorker", None]):
    """Restore what ``Save`` wrote."""

    title = "load"
    folder: str

    def run(self, worker: RankWorker) -> None:
        worker.load(self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export(Command["RankWorker", None]):
    """Write the model that users want as a Hugging Face folder."""

    title = "export"
    folder: str

    def run(self, worker: RankWorker) -> None:
        worker.export(self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePolicy(Command["Worker", Means]):
    title = "score policy"

    def run(self, worker: Worker) -> Means | None:
        return worker.score_policy()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCritic(Command["Worker", Means]):
    title = "score critic"

    def run(self, worker: Worker) -> Means | None:
        return worker.score_critic()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeAdvantages(Command["Worker", Means]):
    title = "advantages"
    kl_coefficient: float

    def run(self, worker: Worker) -> Means | None:
        return worker.compute_advantages(self.kl_coefficient)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePolicy(Command["Worker", UpdateStats]):
    title = "update policy"
    mini_batch: int

    def run(self, worker: Worker) -> UpdateStats | None:
        return worker.update_policy(self.mini_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCritic(Command["Worker", UpdateStats]):
    title = "update critic"
    mini_batch: int

    def run(self, worker: Worker) -> UpdateStats | None:
        return worker.update_critic(self.mini_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMetrics(Command["Worker", Means]):
    """Memory of the rank that has most of it."""

    title = "memory metrics"

    def run(self, worker: Worker) -> Means:
        return worker.memory_metrics()


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish(Command["Worker", WeightManifest | SyncFailure]):
    """Bring these engines to the present weights."""

    title = "publish"
    version: int
    endpoints: Sequence[Endpoint]

    def run(self, worker: Worker) -> WeightManifest | SyncFailure:
        return worker.publish(self.version, self.endpoints)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginTraining(Command["Worker", SyncFailure | None]):
    """Engines on the trainers' devices give back ``tags`` of their memory (None: all they give); the trainers' comes back."""

    title = "make room"
    endpoints: Sequence[Endpoint]
    tags: Sequence[str] | None = None

    def run(self, worker: Worker) -> SyncFailure | None:
        return worker.begin_training(self.endpoints, self.tags)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTraining(Command["Worker", SyncFailure | None]):
    """Undo ``BeginTraining`` with engines that kept their weights."""

    title = "make room"
    endpoints: Sequence[Endpoint]

    def run(self, worker: Worker) -> SyncFailure | None:
        return worker.end_training(self.endpoints)


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeRoom(Command["Worker", None]):
    """Put away what is put away while engines have the devices, for engines that are about to start."""

    title = "make room"

    def run(self, worker: Worker) -> None:
        worker.make_room()


@dataclass(frozen=True, slots=True, kw_only=True)
class Update(Command["FinetuneWorker", UpdateStats]):
    """One optimizer step on the loaded examples."""

    title = "update"

    def run(self, worker: FinetuneWorker) -> UpdateStats | None:
        return worker.update()


@dataclass(frozen=True, slots=True, kw_only=True)
class Validate(Command["FinetuneWorker", Means]):
    """The statistics of the loss on the loaded examples."""

    title = "validate"

    def run(self, worker: FinetuneWorker) -> Means | None:
        return worker.validate()
