"""Soft overlong punishment (Yu et al. 2025, DAPO, equation 13): a penalty that grows as an answer nears the length limit."""

from __future__ import annotations


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: float, penalty: float) -> float:
    """0 up to (1 - ``buffer``) * ``max_tokens`` tokens, then linear down to -``penalty`` at ``max_tokens`` and beyond.

    ``buffer`` is a share of ``max_tokens``; 0 turns the penalty off.
    """
    if buffer <= 0:
        return 0.0
    soft = buffer * max_tokens
    excess = num_tokens - (max_tokens - soft)
    return -penalty * min(max(excess / soft, 0.0), 1.0)
