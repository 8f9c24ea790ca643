"""REINFORCE++ (Hu et al. 2025, "REINFORCE++: stabilizing critic-free policy optimization", equations 6 to 10).

    plain     A_t = sum over s >= t of gamma^(s - t) * (r_s - coefficient * KL_s), whitened over the whole batch
    baseline  A_i = r_i - mean(r of the group), whitened over the whole batch; KL (k2) in the loss

Both use PPO's clipped loss without a critic.
"""

from __future__ import annotations

from rlx.algos.base import Algorithm
from rlx.algos.grpo import group_relative_advantages
from rlx.algos.policy_loss import ppo_policy_loss
from rlx.config.algorithm import AlgorithmConfig


def make_reinforce_pp(config: AlgorithmConfig) -> Algorithm:
    """Works with one answer a prompt: advantages are whitened returns of token rewards."""
    return Algorithm(kind="returns", policy_loss=lambda inputs: ppo_policy_loss(inputs, config))


def make_reinforce_pp_baseline(config: AlgorithmConfig) -> Algorithm:
    """The group's mean is the baseline, the batch's standard deviation the scale."""
    return Algorithm(
        kind="group",
        group_advantages=lambda rewards, valid, _: group_relative_advantages(rewards, valid, config.normalize_by_std),
        policy_loss=lambda inputs: ppo_policy_loss(inputs, config),
    )
