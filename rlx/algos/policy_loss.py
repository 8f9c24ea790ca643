"""The clipped policy loss (Schulman et al. 2017, PPO; asymmetric limits after Yu et al. 2025, DAPO) and its companions.

Every loss here is the SUM over tokens of ``weights_T`` times the token's loss; nothing is divided. Tokens with weight 0
may hold anything, also inf or NaN. Statistics are (sum, count) over the tokens whose weight is not 0:

    policy         the clipped term alone, without entropy and KL
    ratio          new / old probability
    clip_fraction  share of tokens whose ratio limit was in force (their gradient is 0)
    approx_kl      k3 estimate of KL(old || new)
    entropy        of the policy, when given
    kl_ref         the estimate added to the loss, when added
    mismatch       |old - rollout| log-prob: the trainer against the engine, when given

Shape legend: T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlx.algos.kl import MAX_LOG_RATIO, kl_estimate
from rlx.algos.stats import masked, sum_and_count
from rlx.types import LossInputs, LossOutput


def needed(values_T: Tensor | None, name: str, keep_T: Tensor) -> Tensor:
    """A column that the loss cannot do without, 0 off ``keep_T``; ValueError if it is None."""
    if values_T is None:
        raise ValueError(f"the loss needs LossInputs.{name}, which is None")
    return masked(values_T, keep_T)


def clipped_policy_loss(inputs: LossInputs, clip_low: float, clip_high: float) -> LossOutput:
    """sum of w * max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)); log ratio limited to +-20 (see ``kl``)."""
    keep_T = inputs.weights_T != 0
    logprobs_T, old_T = needed(inputs.logprobs_T, "logprobs_T", keep_T), needed(inputs.old_logprobs_T, "old_logprobs_T", keep_T)
    advantages_T = needed(inputs.advantages_T, "advantages_T", keep_T)
    log_ratio_T = (logprobs_T - old_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_T = log_ratio_T.exp()
    free_T = -advantages_T * ratio_T
    limited_T = -advantages_T * ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_T = torch.maximum(free_T, limited_T)
    stats = {
        "policy": sum_and_count(loss_T, keep_T),
        "ratio": sum_and_count(ratio_T, keep_T),
        "clip_fraction": sum_and_count((limited_T > free_T).float(), keep_T),
        "approx_kl": sum_and_count(torch.expm1(log_ratio_T) - log_ratio_T, keep_T),
    }
    if inputs.entropy_T is not None:
        stats["entropy"] = sum_and_count(inputs.entropy_T, keep_T)
    if inputs.rollout_logprobs_T is not None:
        stats["mismatch"] = sum_and_count((old_T - needed(inputs.rollout_logprobs_T, "rollout_logprobs_T", keep_T)).abs(), keep_T)
    return LossOutput(loss=(inputs.weights_T * loss_T).sum(), stats=stats)


def entropy_bonus(inputs: LossInputs, coefficient: float) -> LossOutput:
    """-coefficient * sum of w * entropy; adds no statistics (``clipped_policy_loss`` reports the entropy)."""
    keep_T = inputs.weights_T != 0
    return LossOutput(loss=-coefficient * (inputs.weights_T * needed(inputs.entropy_T, "entropy_T", keep_T)).sum(), stats={})


def kl_penalty(inputs: LossInputs, coefficient: float, estimator: str) -> LossOutput:
    """coefficient * sum of w * KL estimate against the reference, with its gradient."""
    keep_T = inputs.weights_T != 0
    kl_T = kl_estimate(
        needed(inputs.logprobs_T, "logprobs_T", keep_T), needed(inputs.ref_logprobs_T, "ref_logprobs_T", keep_T), estimator
    )
    stats = {"kl_ref": sum_and_count(kl_T, keep_T)}
    return LossOutput(loss=coefficient * (inputs.weights_T * kl_T).sum(), stats=stats)


def add_losses(*terms: LossOutput) -> LossOutput:
    """Sum of the losses; statistics side by side (a later term wins where two share a key)."""
    loss = torch.stack([term.loss for term in terms]).sum()
    return LossOutput(loss=loss, stats={key: value for term in terms for key, value in term.stats.items()})
