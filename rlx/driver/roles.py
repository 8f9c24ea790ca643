"""What the driver may ask of the rest of the system: five Protocols, no implementation.

The driver holds no tensors: scored columns (log-probs, values, advantages) stay on the ranks that computed them,
addressed by sample id, from ``load_batch`` until the next one. Every call is synchronous for the driver and
collective for the ranks behind it; errors raise in the driver with role, rank and phase.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlx.driver.keeping import KeptModels
from rlx.types.layout import BatchPlan
from rlx.types.rollout import (
    Prompt,
    RolloutGroup,
    SamplingSpec,
    UpdateStats,
)
from rlx.types.train_batch import Rows
from rlx.types.weights import WeightManifest


class PolicyGroup(KeptModels, Protocol):
    """The trained policy and the batch it works on."""

    def begin_training(self) -> None:
        """The step's rollouts are done: engines that share the trainers' devices make room until ``publish``."""

    def load_batch(self, batch: Rows, plan: BatchPlan) -> None:
        """Hand every rank its rows of the rollout batch, as planned; forgets the previous one."""

    def score(self) -> Mapping[str, float]:
        """Compute old log-probs (and entropy) under the present weights. Returns token means over the batch:
        ``policy/entropy``, ``mismatch/...`` and, when a reference scored before, ``kl/ref``."""

    def compute_advantages(self, kl_coefficient: float) -> Mapping[str, float]:
        """Turn rewards (and values, and KL) into advantages and returns on the ranks."""

    def update(self, mini_batch: int) -> UpdateStats:
        """One optimizer step on one mini-batch of the plan."""

    def publish(self, version: int) -> WeightManifest | None:
        """Send the present weights to every engine as ``version`` and verify them when due; None without engines."""


class CriticGroup(Protocol):
    def score(self) -> Mapping[str, float]:
        """Compute values of every position of the loaded batch."""

    def update(self, mini_batch: int) -> UpdateStats: ...


class ReferenceGroup(Protocol):
    def score(self) -> Mapping[str, float]:
        """Compute reference log-probs of the loaded batch."""


class RolloutService(Protocol):
    def begin_step(self, step: int) -> None:
        """Say which step the following groups belong to (recording and replay keep them apart)."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSpec) -> Iterator[RolloutGroup]:
        """Yield one group a prompt, in the order they finish (rewards None)."""

    def counts(self) -> Mapping[str, float]:
        """Metrics of what went wrong and was made good since the last call."""

    def close(self) -> None: ...


class RewardService(Protocol):
    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        """Fill in rewards, concurrently with the iteration over ``groups``."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everyone the driver talks to."""

    policy: PolicyGroup
    critic: CriticGroup | None
    reference: ReferenceGroup | None
    rollout: RolloutService
    reward: RewardService
