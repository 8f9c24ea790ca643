"""Group sequence policy optimisation (Zheng et al. 2025, "Group sequence policy optimization", equations 5 to 7).

    s_i = exp(mean over the tokens of answer i of log(new / old));   loss = mean over answers of
    max(-A_i s_i, -A_i clip(s_i, 1 - eps_low, 1 + eps_high));   A_i as in GRPO

Shape legend: T packed tokens of this rank, S sequences.
"""

from __future__ import annotations

import torch

from rlx.algos.base import Algorithm
from rlx.algos.grpo import group_relative_advantages
from rlx.algos.kl import MAX_LOG_RATIO
from rlx.algos.policy_loss import surrogate, tokens_of, with_extras
from rlx.algos.sequence import sequence_means
from rlx.config.algorithm import AlgorithmConfig
from rlx.types.batch import LossInputs, LossOutput


def sequence_ratio_loss(inputs: LossInputs, config: AlgorithmConfig) -> LossOutput:
    """Every token of an answer carries the answer's loss, so that any aggregation's weights apply."""
    tokens = tokens_of(inputs)
    raw_T = tokens.logprobs_T - tokens.old_T
    means_S = sequence_means(raw_T, tokens.keep_T, inputs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    assert inputs.sequence_T is not None
    ratio_T = means_S.exp()[inputs.sequence_T]
    free_T = -tokens.advantages_T * ratio_T
    clipped_T = -tokens.advantages_T * ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    return surrogate(inputs, tokens, torch.maximum(free_T, clipped_T), ratio_T, clipped_T > free_T)


def make_gspo(config: AlgorithmConfig) -> Algorithm:
    """GSPO: one ratio a sequence."""
    return Algorithm(
        kind="group",
        group_advantages=lambda rewards, valid, _: group_relative_advantages(rewards, valid, config.normalize_by_std),
        policy_loss=lambda inputs: with_extras(sequence_ratio_loss(inputs, config), inputs, config),
    )
