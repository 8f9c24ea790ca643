"""ReMax (Li et al. 2024, "ReMax: a simple, effective, and efficient reinforcement learning method", equation 5).

A_i = r_i - reward of the greedy answer to the same prompt;   token losses are summed over an answer
"""

from __future__ import annotations

from collections.abc import Sequence

from rlx.algos.base import Algorithm
from rlx.algos.grpo import valid_rewards
from rlx.algos.policy_loss import ppo_policy_loss
from rlx.config.algorithm import AlgorithmConfig


def greedy_baseline_advantages(rewards: Sequence[float], valid: Sequence[bool], baseline: float | None) -> list[float]:
    """reward - baseline; 0 for invalid ones, and for the whole group when its greedy answer could not be scored (None)."""
    valid_rewards(rewards, valid)
    if baseline is None:
        return [0.0] * len(rewards)
    return [reward - baseline if is_valid else 0.0 for reward, is_valid in zip(rewards, valid, strict=True)]


def make_remax(config: AlgorithmConfig) -> Algorithm:
    """ReMax: the driver asks for one greedy answer a prompt more."""
    return Algorithm(
        kind="group",
        greedy_baseline=True,
        group_advantages=greedy_baseline_advantages,
        policy_loss=lambda inputs: ppo_policy_loss(inputs, config),
    )
