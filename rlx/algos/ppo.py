"""Proximal policy optimisation (Schulman et al. 2017) with a learnt critic, on token-level rewards (Ziegler et al. 2019).

Shape legend: T packed tokens, L tokens of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlx.algos.base import Algorithm
from rlx.algos.policy_loss import ppo_policy_loss
from rlx.algos.value_loss import clipped_value_loss
from rlx.config.algorithm import AlgorithmConfig


def token_rewards(reward: float, mask_L: Tensor, kl_L: Tensor | None = None, kl_coefficient: float = 0.0) -> Tensor:
    """Rewards [L] of one sample, position-aligned: the verdict at its last response position, and -kl_coefficient * KL
    at every response position when ``kl_L`` is given. All 0 without response positions."""
    keep_L = mask_L != 0
    rewards_L = torch.zeros(mask_L.shape, dtype=torch.float32, device=mask_L.device)
    if kl_L is not None:
        rewards_L = torch.where(keep_L, -kl_coefficient * kl_L.float(), rewards_L)
    positions = keep_L.nonzero()
    if positions.numel():
        rewards_L[positions[-1]] += reward
    return rewards_L


def make_ppo(config: AlgorithmConfig) -> Algorithm:
    """PPO: one value a token, GAE on the workers."""
    return Algorithm(
        kind="critic",
        policy_loss=lambda inputs: ppo_policy_loss(inputs, config),
        value_loss=lambda inputs: clipped_value_loss(inputs, config.value_clip),
    )
