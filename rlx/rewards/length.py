"""A reward for the length of a response, to be summed with others."""

from __future__ import annotations

from dataclasses import dataclass

from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthShape:
    """0 for ``minimum`` to ``free`` sampled tokens, falling linearly to -1 at ``limit`` tokens (and at 0 tokens below the
    minimum). Raises ValueError unless 0 <= minimum <= free < limit."""

    free: int
    limit: int
    minimum: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.free < self.limit:
            raise ValueError(
                "reward.args: length needs 0 <= minimum <= free < limit,"
                f" got minimum {self.minimum}, free {self.free}, limit {self.limit}"
            )

    def __call__(self, request: RewardRequest) -> Reward:
        size = request.trajectory.num_sampled
        if size < self.minimum:
            return Reward(value=-(self.minimum - size) / self.minimum)
        return Reward(value=-min(1.0, max(0.0, (size - self.free) / (self.limit - self.free))))
