"""Estimators of KL(policy || reference) from the policy's own samples (Schulman 2020, "Approximating KL divergence").

With r = reference / policy on the sampled token and log r = ref_logprob - logprob:

    k1 = -log r              unbiased, may be negative, high variance
    k2 = (log r)^2 / 2       biased, low variance; as a loss its gradient is that of the reverse KL (the useful one)
    k3 = r - 1 - log r       unbiased, never negative

As a loss term, gradients flow through ``logprobs_T`` as written; that of k1 has expectation 0, so k1 in a loss adds
noise only. Shape legend: T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp(20) = 4.9e8 and its square still fit float32. Beyond it a ratio says only "far away": the value saturates and
# the gradient through it is 0, instead of inf and NaN.
MAX_LOG_RATIO = 20.0


def clamped_log_ratio(numerator_T: Tensor, denominator_T: Tensor) -> Tensor:
    """log(numerator / denominator) from log-probs, limited to +-MAX_LOG_RATIO (gradient 0 beyond)."""
    return (numerator_T - denominator_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_estimate(logprobs_T: Tensor, ref_logprobs_T: Tensor, estimator: str) -> Tensor:
    """Per-token estimate [T] by ``estimator`` (k1, k2, k3), log ratio clamped; ValueError on another name."""
    log_r_T = clamped_log_ratio(ref_logprobs_T, logprobs_T)
    if estimator == "k1":
        return -log_r_T
    if estimator == "k2":
        return 0.5 * log_r_T.square()
    if estimator == "k3":
        return torch.expm1(log_r_T) - log_r_T
    raise ValueError(f"algorithm.kl_estimator must be k1, k2 or k3, got {estimator!r}")
