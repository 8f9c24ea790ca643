"""What the trainer needs to know of an algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlx.types import LossInputs, LossOutput

LossFunction = Callable[[LossInputs], LossOutput]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """``group_relative``: advantages come from the group's rewards (driver), not from a critic (workers).

    ``policy_loss`` and ``value_loss`` return sums over tokens; ``value_loss`` is None without a critic.
    """

    needs_critic: bool
    group_relative: bool
    policy_loss: LossFunction
    value_loss: LossFunction | None = None
