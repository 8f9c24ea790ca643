"""LongRoPE (Ding et al. 2024) as read from a ``config.json``: two sets of rotary frequencies, chosen sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """Divisors of the inverse frequencies ([K / 2] each), the length up to which the short ones hold, and the factor on
    rotated queries and keys."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float
