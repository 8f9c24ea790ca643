"""The trainer's probabilities against the engine's: how far they drift, and importance weights that correct for it.

With log w_t = old_logprob_t - rollout_logprob_t on the response tokens of one sample (Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training"; Liu et al. 2025, "When speed kills stability"):

    token-truncate     min(w_t, high)
    token-mask         w_t where low <= w_t <= high, else 0
    sequence-truncate  min(prod w, high), the same for every token
    sequence-mask      prod w where low <= prod w <= high, else 0

Independently, a sequence is rejected (weight 0) when its geometric mean exp(mean log w) leaves [reject_low, reject_high].
Weights carry no gradient. Shape legend: L tokens of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlx.algos.kl import MAX_LOG_RATIO
from rlx.algos.stats import masked, sum_and_count
from rlx.config.algorithm import AlgorithmConfig

Stats = dict[str, Tensor]


def drift(old_L: Tensor, rollout_L: Tensor, mask_L: Tensor) -> Stats:
    """(sum, count) of one sample's drift measures, over tokens unless said otherwise:

    logprob_abs_mean      |log w|
    kl                    k3 estimate of KL(engine || trainer)
    ratio_mean            w
    chi2                  w^2 - 1
    sequence_log_ratio    |sum of log w|, over sequences
    geometric_mean_ratio  exp(mean of log w), over sequences
    """
    keep_L = mask_L != 0
    log_w_L = _log_ratio(old_L, rollout_L, keep_L)
    ratio_L = log_w_L.exp()
    stats = {
        "logprob_abs_mean": sum_and_count(log_w_L.abs(), keep_L),
        "kl": sum_and_count(torch.expm1(log_w_L) - log_w_L, keep_L),
        "ratio_mean": sum_and_count(ratio_L, keep_L),
        "chi2": sum_and_count(ratio_L.square() - 1, keep_L),
    }
    total, count = stats["logprob_abs_mean"].new_tensor([float(log_w_L.sum()), float(keep_L.sum())])
    any_token = (count > 0).reshape(1)
    stats["sequence_log_ratio"] = sum_and_count(total.abs().reshape(1), any_token)
    stats["geometric_mean_ratio"] = sum_and_count((total / count.clamp(min=1)).exp().reshape(1), any_token)
    return stats


@torch.no_grad()
def importance_weights(old_L: Tensor, rollout_L: Tensor, mask_L: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Stats]:
    """Weights [L] (1 off the mask) of one sample as ``config`` asks for, and what was done:

    truncated_fraction, masked_fraction   over tokens
    rejected_fraction                     over sequences
    """
    keep_L = mask_L != 0
    log_w_L = _log_ratio(old_L, rollout_L, keep_L)
    mean = log_w_L.sum() / keep_L.sum().clamp(min=1)
    raw_L = log_w_L.exp()
    if config.mismatch_correction.startswith("sequence"):
        raw_L = log_w_L.sum().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(log_w_L)
    high_L, low_L = raw_L > config.mismatch_high, raw_L < config.mismatch_low
    nothing_L = torch.zeros_like(keep_L)
    truncated_L = masked_L = nothing_L
    weights_L = torch.ones_like(raw_L)
    if config.mismatch_correction.endswith("truncate"):
        weights_L, truncated_L = raw_L.clamp(max=config.mismatch_high), high_L
    elif config.mismatch_correction.endswith("mask"):
        masked_L = high_L | low_L
        weights_L = torch.where(masked_L, 0.0, raw_L)
    geometric, upper = float(mean.exp()), config.mismatch_reject_high
    rejected = geometric < config.mismatch_reject_low or (upper is not None and geometric > upper)
    weights_L = torch.where(keep_L, weights_L * (0.0 if rejected else 1.0), 1.0)
    stats = {
        "truncated_fraction": sum_and_count(truncated_L.float(), keep_L),
        "masked_fraction": sum_and_count(masked_L.float(), keep_L),
        "rejected_fraction": sum_and_count(weights_L.new_tensor([float(rejected)]), keep_L.any().reshape(1)),
    }
    return weights_L, stats


def _log_ratio(old_L: Tensor, rollout_L: Tensor, keep_L: Tensor) -> Tensor:
    return masked(old_L - rollout_L, keep_L).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
