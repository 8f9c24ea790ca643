"""Group relative policy optimisation (Shao et al. 2024, "DeepSeekMath", equations 3 and 4).

A_i = (r_i - mean(r)) / std(r);   loss = mean over answers of the mean over tokens of PPO's clipped loss
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlx.algos.base import Algorithm
from rlx.algos.policy_loss import ppo_policy_loss
from rlx.config.algorithm import AlgorithmConfig

EPSILON = 1e-6


def valid_rewards(rewards: Sequence[float], valid: Sequence[bool]) -> list[float]:
    """The rewards that count; ValueError when the lengths differ or one of these is not finite."""
    if len(rewards) != len(valid):
        raise ValueError(f"{len(rewards)} rewards but {len(valid)} validity marks")
    counted = [reward for reward, is_valid in zip(rewards, valid, strict=True) if is_valid]
    if not all(math.isfinite(reward) for reward in counted):
        raise ValueError(f"valid rewards must be finite, got {counted}")
    return counted


def group_relative_advantages(rewards: Sequence[float], valid: Sequence[bool], normalize_by_std: bool) -> list[float]:
    """(reward - mean) [/ (sample standard deviation + 1e-6)] over the valid rewards of one group.

    Invalid samples take no part and get 0. A group with fewer than two valid rewards, or only equal ones, gets exact 0s.
    Raises ValueError when the lengths differ or a valid reward is not finite.
    """
    counted = valid_rewards(rewards, valid)
    if len(counted) < 2 or min(counted) == max(counted):
        return [0.0] * len(rewards)
    mean = math.fsum(counted) / len(counted)
    scale = 1.0
    if normalize_by_std:
        variance = math.fsum((reward - mean) ** 2 for reward in counted) / (len(counted) - 1)
        scale = math.sqrt(variance) + EPSILON
    return [(reward - mean) / scale if is_valid else 0.0 for reward, is_valid in zip(rewards, valid, strict=True)]


def make_grpo(config: AlgorithmConfig) -> Algorithm:
    """GRPO: PPO's policy loss on group-relative advantages, no critic."""
    return Algorithm(
        kind="group",
        group_advantages=lambda rewards, valid, _: group_relative_advantages(rewards, valid, config.normalize_by_std),
        policy_loss=lambda inputs: ppo_policy_loss(inputs, config),
    )
