"""Clipped importance-sampling policy optimisation (MiniMax 2025, "MiniMax-M1", equations 4 and 5).

    loss = sum over tokens of -stop_gradient(clip(rho, 1 - eps_low, 1 + eps_high)) * A * log pi / all tokens

The weight is clipped, not the update: every token keeps a gradient. ``clip_low`` 1 leaves no lower limit.
Shape legend: T packed tokens.
"""

from __future__ import annotations

from rlx.algos.base import Algorithm
from rlx.algos.grpo import group_relative_advantages
from rlx.algos.policy_loss import surrogate, tokens_of, with_extras
from rlx.config.algorithm import AlgorithmConfig
from rlx.types.batch import LossInputs, LossOutput


def clipped_weight_loss(inputs: LossInputs, config: AlgorithmConfig) -> LossOutput:
    """REINFORCE with a clipped importance weight; ``clip_fraction`` counts clipped weights."""
    tokens = tokens_of(inputs)
    ratio_T = tokens.log_ratio_T.exp().detach()
    weight_T = ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss_T = -weight_T * tokens.advantages_T * tokens.logprobs_T
    return surrogate(inputs, tokens, loss_T, ratio_T, weight_T != ratio_T)


def make_cispo(config: AlgorithmConfig) -> Algorithm:
    """CISPO: GRPO's advantages."""
    return Algorithm(
        kind="group",
        group_advantages=lambda rewards, valid, _: group_relative_advantages(rewards, valid, config.normalize_by_std),
        policy_loss=lambda inputs: with_extras(clipped_weight_loss(inputs, config), inputs, config),
    )
