"""Sums and counts over masked tokens, so that every reported mean survives any split of the tokens.

Shape legend: T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """``values_T`` where ``mask_T`` (bool [T]), 0 elsewhere; inf and NaN off the mask do not get through."""
    return torch.where(mask_T, values_T, torch.zeros_like(values_T))


def sum_and_count(values_T: Tensor, mask_T: Tensor) -> Tensor:
    """float64 [2]: the sum of ``values_T`` over ``mask_T`` (bool [T]) and the number of tokens in it; no gradient."""
    total = masked(values_T.detach().double(), mask_T).sum()
    return torch.stack([total, mask_T.sum().double()])
