"""What the trainer needs to know of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlx.types.batch import LossInputs, LossOutput

LossFunction = Callable[[LossInputs], LossOutput]

GroupAdvantages = Callable[[Sequence[float], Sequence[bool], float | None], list[float]]
"""(rewards, which of them are valid, the greedy answer's reward where there is one) of one group -> advantages."""

AdvantageKind = Literal["critic", "group", "returns", "process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """``kind`` says where advantages come from: a critic (GAE), the group's rewards (``group_advantages``, on the driver),
    the returns of token rewards, or the group's rewards and a process reward model.

    Losses are sums over tokens. ``value_loss`` trains the second model (critic, process reward model), None without one;
    ``critic_first``: that model learns from a batch before it scores it. ``greedy_baseline``: each prompt is also
    answered greedily, and that answer's reward handed to ``group_advantages``.
    """

    kind: AdvantageKind
    policy_loss: LossFunction
    group_advantages: GroupAdvantages | None = None
    value_loss: LossFunction | None = None
    critic_first: bool = False
    greedy_baseline: bool = False

    @property
    def needs_critic(self) -> bool:
        return self.value_loss is not None
