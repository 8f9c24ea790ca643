"""The clipped value loss of PPO (Schulman et al. 2017, as in OpenAI's baselines).

Statistics, (sum, count) over the tokens whose weight is not 0:

    value                the loss
    value_clip_fraction  share of tokens where the clipped error was the larger one
    value_mean, return_mean

Shape legend: T packed tokens, L tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlx.algos.policy_loss import needed
from rlx.algos.stats import sum_and_count
from rlx.types.batch import LossInputs, LossOutput


def clipped_value_loss(inputs: LossInputs, value_clip: float | None) -> LossOutput:
    """sum of w * 0.5 * max((v - R)^2, (clip(v, v_old +- value_clip) - R)^2); None leaves the clipping out."""
    keep_T = inputs.weights_T != 0
    values_T, returns_T = needed(inputs.values_T, "values_T", keep_T), needed(inputs.returns_T, "returns_T", keep_T)
    error_T = (values_T - returns_T).square()
    largest_T = error_T
    if value_clip is not None:
        old_T = needed(inputs.old_values_T, "old_values_T", keep_T)
        clipped_T = old_T + (values_T - old_T).clamp(-value_clip, value_clip)
        largest_T = torch.maximum(error_T, (clipped_T - returns_T).square())
    loss_T = 0.5 * largest_T
    stats = {
        "value": sum_and_count(loss_T, keep_T),
        "value_clip_fraction": sum_and_count((largest_T > error_T).float(), keep_T),
        "value_mean": sum_and_count(values_T, keep_T),
        "return_mean": sum_and_count(returns_T, keep_T),
    }
    return LossOutput(loss=(inputs.weights_T * loss_T).sum(), stats=stats)


FIT = ("return", "return_square", "residual", "residual_square")


def fit(values_L: Tensor, returns_L: Tensor, mask_L: Tensor) -> dict[str, Tensor]:
    """(sum, count) over one sample's tokens of what ``explained_variance`` joins, by the names of ``FIT``."""
    keep_L, residual_L = mask_L != 0, returns_L.double() - values_L.double()
    columns = (returns_L.double(), returns_L.double().square(), residual_L, residual_L.square())
    return {name: sum_and_count(column_L, keep_L) for name, column_L in zip(FIT, columns, strict=True)}


def explained_variance(means: Mapping[str, float]) -> float | None:
    """1 - Var(returns - values) / Var(returns) from the means of ``fit``; None for constant returns, which leave nothing to
    explain."""
    variance = means["return_square"] - means["return"] ** 2
    if variance <= 1e-12:
        return None
    return 1.0 - (means["residual_square"] - means["residual"] ** 2) / variance
