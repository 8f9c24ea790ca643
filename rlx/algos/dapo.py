"""Decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, "DAPO", equations 8 to 13).

    A_i = (r_i - mean(r)) / std(r);   loss = sum of min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) / all tokens

Its other parts live where they act: groups of equal rewards are replaced by the driver (``dynamic_sampling``), length is
punished before advantages are taken (``overlong_buffer``), answers cut off are left out (``overlong_filter``).
"""

from __future__ import annotations

from rlx.algos.base import Algorithm
from rlx.algos.grpo import make_grpo
from rlx.config.algorithm import AlgorithmConfig


def make_dapo(config: AlgorithmConfig) -> Algorithm:
    """DAPO differs from GRPO by its defaults: clip-higher, token-mean, dynamic sampling, soft overlong punishment."""
    return make_grpo(config)
