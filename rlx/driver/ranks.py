"""Trainer ranks that rank 0 drives: the Protocols of ``trainer.roles`` over a command loop.

Rank 0 calls; every rank, rank 0 included, runs the same method of its worker. The others wait in ``serve``:
they consume (method, arguments), produce their answer, wait for rank 0 only, and stop at the stop command. A rank that
fails logs its cause and ends its process; whoever supervises the ranks then stops the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

from rlx.models.hf.fingerprint import origin_of
from rlx.obs.log import Phase, current_phase, enter_phase
from rlx.trainer.rank_worker import RankWorker
from rlx.types.layout import BatchPlan
from rlx.types.rollout import TrainSample, UpdateStats
from rlx.types.weights import WeightManifest

# How long a rank waits for the next command. Rollouts may take hours; a rank 0 that dies closes the connection, which
# ends the wait at once, so this limit only guards against a network that swallows packets.
COMMAND_WAIT_S = 24 * 3600.0


class Ranks:
    """The worker of this rank and its peers."""

    def __init__(self, worker: RankWorker) -> None:
        self.worker = worker
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=COMMAND_WAIT_S))

    def call(self, method: str, *args: Any) -> Any:
        """On rank 0: run ``method`` on every rank; the first answer that is not None (in rank order)."""
        now = current_phase()
        self._broadcast((now.step, method, args))
        return self._answer(method, args)

    def serve(self) -> None:
        """On the other ranks: run commands until told to stop."""
        while True:
            command = self._broadcast(None)
            if command is None:
                return
            step, method, args = command
            enter_phase(Phase(step=step, name=method.replace("_", " ")))
            self._answer(method, args)
            enter_phase(Phase(step=step, name="wait for the driver"))

    def stop(self) -> None:
        """On rank 0: end the other ranks' ``serve``."""
        self._broadcast(None)

    def _answer(self, method: str, args: Sequence[Any]) -> Any:
        result = getattr(self.worker, method)(*args)
        answers = self.worker.context.gather_objects(result)
        return next((answer for answer in answers if answer is not None), None)

    def _broadcast(self, command: Any) -> Any:
        box = [command]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


class Engines(Protocol):
    """How weights reach the engines, and how those that share the trainers' devices take turns with them."""

    def publish(self, version: int) -> WeightManifest: ...

    def begin_training(self) -> None: ...

    def room(self) -> AbstractContextManager[None]:
        """Everything of the trainers is on its device inside."""
        ...


class RankedPolicy:
    """PolicyGroup over ranks. ``engines`` None: there are none."""

    def __init__(self, ranks: Ranks, engines: Engines | None) -> None:
        self._ranks = ranks
        self._engines = engines

    def begin_training(self) -> None:
        if self._engines is not None:
            self._engines.begin_training()

    def load_batch(self, samples: Sequence[TrainSample], plan: BatchPlan) -> None:
        self._ranks.call("load_batch", samples, plan)

    def score(self) -> Mapping[str, float]:
        means: Mapping[str, float] = self._ranks.call("score_policy")
        return means

    def compute_advantages(self, kl_coefficient: float) -> Mapping[str, float]:
        means: Mapping[str, float] = self._ranks.call("compute_advantages", kl_coefficient)
        return means

    def update(self, mini_batch: int) -> UpdateStats:
        stats: UpdateStats = self._ranks.call("update_policy", mini_batch)
        return stats

    def publish(self, version: int) -> WeightManifest | None:
        return None if self._engines is None else self._engines.publish(version)

    def origin(self) -> Mapping[str, object]:
        return origin_of(self._ranks.worker.config)

    def save(self, path: str) -> None:
        with self._room():
            self._ranks.call("save", path)

    def load(self, path: str) -> None:
        self._ranks.call("load", path)

    def export_hf(self, path: str) -> None:
        with self._room():
            self._ranks.call("export", path)

    def _room(self) -> AbstractContextManager[None]:
        return nullcontext() if self._engines is None else self._engines.room()


class RankedCritic:
    """CriticGroup over ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def score(self) -> Mapping[str, float]:
        means: Mapping[str, float] = self._ranks.call("score_critic")
        return means

    def update(self, mini_batch: int) -> UpdateStats:
        stats: UpdateStats = self._ranks.call("update_critic", mini_batch)
        return stats


class RankedReference:
    """ReferenceGroup over ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def score(self) -> Mapping[str, float]:
        means: Mapping[str, float] = self._ranks.call("score_reference")
        return means
