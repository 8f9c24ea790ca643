"""GRPO done right (Liu et al. 2025, "Understanding R1-Zero-like training", section 3.2).

    A_i = r_i - mean(r);   loss = sum over tokens of PPO's clipped loss / (answers x a constant)

Neither the group's standard deviation nor an answer's own length enters, which is what biases GRPO.
"""

from __future__ import annotations

from rlx.algos.base import Algorithm
from rlx.algos.grpo import make_grpo
from rlx.config.algorithm import AlgorithmConfig


def make_dr_grpo(config: AlgorithmConfig) -> Algorithm:
    """Dr. GRPO differs from GRPO by its defaults: ``normalize_by_std`` false, ``loss_aggregation`` constant."""
    return make_grpo(config)
