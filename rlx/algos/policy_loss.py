"""The clipped policy loss (Schulman et al. 2017, PPO; asymmetric limits after Yu et al. 2025, DAPO) and its companions.

Every loss here is the SUM over tokens of ``weights_T`` times the token's loss; nothing is divided. Tokens with weight 0
may hold anything, also inf or NaN. Statistics are (sum, count) over the tokens whose weight is not 0:

    policy         the clipped term alone, without entropy and KL
    ratio          new / old probability
    clip_fraction  share of tokens whose ratio limit was in force (their gradient is 0)
    approx_kl      k3 estimate of KL(old || new)
    kl_ref         the estimate added to the loss, when added

Shape legend: T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlx.algos.kl import MAX_LOG_RATIO, kl_estimate
from rlx.algos.stats import masked, sum_and_count
from rlx.config.algorithm import AlgorithmConfig
from rlx.types.batch import LossInputs, LossOutput


def needed(values_T: Tensor | None, name: str, keep_T: Tensor) -> Tensor:
    """A column that the loss cannot do without, 0 off ``keep_T``; ValueError if it is None."""
    if values_T is None:
        raise ValueError(f"the loss needs LossInputs.{name}, which is None")
    return masked(values_T, keep_T)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """The columns of a policy loss, 0 off ``keep_T``; the log ratio is limited to +-20 (see ``kl``)."""

    keep_T: Tensor
    logprobs_T: Tensor
    old_T: Tensor
    advantages_T: Tensor
    log_ratio_T: Tensor


def tokens_of(inputs: LossInputs) -> Tokens:
    """What every policy loss starts from; ValueError names a missing column."""
    keep_T = inputs.weights_T != 0
    logprobs_T, old_T = needed(inputs.logprobs_T, "logprobs_T", keep_T), needed(inputs.old_logprobs_T, "old_logprobs_T", keep_T)
    return Tokens(
        keep_T=keep_T,
        logprobs_T=logprobs_T,
        old_T=old_T,
        advantages_T=needed(inputs.advantages_T, "advantages_T", keep_T),
        log_ratio_T=(logprobs_T - old_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO),
    )


def surrogate(inputs: LossInputs, tokens: Tokens, loss_T: Tensor, ratio_T: Tensor, limited_T: Tensor) -> LossOutput:
    """The weighted sum of ``loss_T``, times the importance weights where given, with the statistics of the module.

    ``limited_T`` (bool) marks the tokens whose ratio limit was in force.
    """
    keep_T, log_ratio_T = tokens.keep_T, tokens.log_ratio_T
    if inputs.importance_T is not None:
        loss_T = loss_T * needed(inputs.importance_T, "importance_T", keep_T)
    stats = {
        "policy": sum_and_count(loss_T, keep_T),
        "ratio": sum_and_count(ratio_T, keep_T),
        "clip_fraction": sum_and_count(limited_T.float(), keep_T),
        "approx_kl": sum_and_count(torch.expm1(log_ratio_T) - log_ratio_T, keep_T),
    }
    return LossOutput(loss=(inputs.weights_T * loss_T).sum(), stats=stats)


def clipped_policy_loss(inputs: LossInputs, clip_low: float, clip_high: float, dual_clip: float | None = None) -> LossOutput:
    """sum of w * max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)).

    ``dual_clip`` c also limits the loss of a negative advantage to c * |A| (Ye et al. 2020, equation 5).
    """
    tokens = tokens_of(inputs)
    ratio_T = tokens.log_ratio_T.exp()
    free_T = -tokens.advantages_T * ratio_T
    clipped_T = -tokens.advantages_T * ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_T, limited_T = torch.maximum(free_T, clipped_T), clipped_T > free_T
    if dual_clip is not None:
        ceiling_T = -dual_clip * tokens.advantages_T
        over_T = (tokens.advantages_T < 0) & (loss_T > ceiling_T)
        loss_T, limited_T = torch.where(over_T, ceiling_T, loss_T), limited_T | over_T
    return surrogate(inputs, tokens, loss_T, ratio_T, limited_T)


def clipped_term(inputs: LossInputs, config: AlgorithmConfig) -> LossOutput:
    """``clipped_policy_loss`` with ``config``'s limits."""
    return clipped_policy_loss(inputs, config.clip_low, config.clip_high, config.dual_clip)


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


def with_extras(term: LossOutput, inputs: LossInputs, config: AlgorithmConfig) -> LossOutput:
    """``term`` with the entropy bonus and the KL to the reference where ``config`` asks for them."""
    terms = [term]
    if config.entropy_coefficient > 0:
        terms.append(entropy_bonus(inputs, config.entropy_coefficient))
    if config.kl_placement == "loss":
        terms.append(kl_penalty(inputs, config.kl_coefficient, config.kl_estimator))
    return add_losses(*terms)


def ppo_policy_loss(inputs: LossInputs, config: AlgorithmConfig) -> LossOutput:
    """The clipped loss with ``config``'s limits and extras: what most algorithms share."""
    return with_extras(clipped_term(inputs, config), inputs, config)


def add_losses(*terms: LossOutput) -> LossOutput:
    """Sum of the losses; statistics side by side (a later term wins where two share a key)."""
    loss = torch.stack([term.loss for term in terms]).sum()
    return LossOutput(loss=loss, stats={key: value for term in terms for key, value in term.stats.items()})
