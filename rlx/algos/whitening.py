"""Whitening of advantages over the response tokens of a whole batch (Andrychowicz et al. 2021, choice C67).

Shape legend: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlx.algos.stats import masked

EPSILON = 1e-8


def _alone(sums: Tensor) -> Tensor:
    return sums


@torch.no_grad()
def whiten(advantages_T: Tensor, mask_T: Tensor, sums: Callable[[Tensor], Tensor] = _alone) -> Tensor:
    """Zero mean and unit (population) variance over ``mask_T``; 0 off the mask.

    ``sums`` gets float64 [3] (sum, sum of squares, count) and returns it summed over the data-parallel ranks: every
    rank must call this, also one without tokens. Equal advantages come out as 0.
    """
    keep_T = mask_T != 0
    values_T = masked(advantages_T.double(), keep_T)
    local = torch.stack([values_T.sum(), values_T.square().sum(), keep_T.sum().double()])
    total, total_squares, count = sums(local).unbind()
    count = count.clamp(min=1.0)
    mean = total / count
    variance = (total_squares / count - mean.square()).clamp(min=0.0)
    return masked((values_T - mean) * torch.rsqrt(variance + EPSILON), keep_T).to(advantages_T.dtype)
