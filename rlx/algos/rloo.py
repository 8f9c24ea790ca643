"""REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, "Back to basics", equation 8).

    A_i = r_i - mean of the other answers' rewards;   a whole answer is one action: token losses are summed, not averaged

With ``kl_placement`` reward each r_i is reduced by coefficient x the KL estimate summed over the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlx.algos.base import Algorithm
from rlx.algos.grpo import valid_rewards
from rlx.algos.policy_loss import ppo_policy_loss
from rlx.config.algorithm import AlgorithmConfig


def leave_one_out_advantages(rewards: Sequence[float], valid: Sequence[bool]) -> list[float]:
    """reward - mean of the group's other valid rewards; 0 for invalid ones and where there is no other."""
    counted = valid_rewards(rewards, valid)
    if len(counted) < 2 or min(counted) == max(counted):
        return [0.0] * len(rewards)
    total, others = math.fsum(counted), len(counted) - 1
    return [reward - (total - reward) / others if is_valid else 0.0 for reward, is_valid in zip(rewards, valid, strict=True)]


def make_rloo(config: AlgorithmConfig) -> Algorithm:
    """RLOO: PPO's clipped loss (its gradient is REINFORCE's on the first step) on leave-one-out advantages."""
    return Algorithm(
        kind="group",
        group_advantages=lambda rewards, valid, _: leave_one_out_advantages(rewards, valid),
        policy_loss=lambda inputs: ppo_policy_loss(inputs, config),
    )
