"""A weighted sum of verifiers, each part reported on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlx.rewards.base import Verifier, asks_group, check_prompt, invalid, warm_up
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One verifier, what it is called in the metrics and what it counts for."""

    name: str
    weight: float
    verifier: Verifier


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """sum of weight * value. ``parts`` of the verdict holds each value, unweighted; a part's own parts come as NAME/part.
    One invalid part makes the whole invalid: a sum without it would be another reward."""

    parts: Sequence[Part]

    def __call__(self, request: RewardRequest) -> Reward:
        return combine([(part, part.verifier(request)) for part in self.parts])

    def check_prompt(self, prompt: Prompt) -> None:
        for part in self.parts:
            check_prompt(part.verifier, prompt)

    @property
    def asks_group(self) -> bool:
        return any(asks_group(part.verifier) for part in self.parts)

    def warm_up(self) -> None:
        for part in self.parts:
            warm_up(part.verifier)


def combine(found: Sequence[tuple[Part, Reward]]) -> Reward:
    """The weighted sum of verdicts that are there."""
    total, values = 0.0, {}
    for part, reward in found:
        if not reward.valid:
            return invalid(f"{part.name}: {reward.error}")
        total += part.weight * reward.value
        values[part.name] = reward.value
        values |= {f"{part.name}/{name}": value for name, value in reward.parts.items()}
    return Reward(value=total, parts=values)
