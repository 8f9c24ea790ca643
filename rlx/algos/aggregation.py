"""How token losses become one number: a weight for each token and one divisor for the whole mini-batch.

    token-mean            1 / all response tokens                       (Yu et al. 2025, DAPO)
    seq-mean-token-mean   1 / (sequences x tokens of this sequence)     (Shao et al. 2024, GRPO)
    seq-mean-token-sum    1 / sequences                                 (a sequence as one action: RLOO, ReMax)
    constant              1 / (sequences x constant)                    (Liu et al. 2025, Dr. GRPO)

The weight depends on its own sequence alone and the divisor on the mini-batch's counts alone, so that a sum of weighted
losses divided once is exact under any split over ranks and micro-batches.
"""

from __future__ import annotations


def token_weight(aggregation: str, num_tokens: int) -> float:
    """What each of a sequence's ``num_tokens`` response tokens counts for before the division."""
    return 1.0 / max(1, num_tokens) if aggregation == "seq-mean-token-mean" else 1.0


def loss_divisor(aggregation: str, num_tokens: int, num_sequences: int, constant: int) -> float:
    """What the summed loss of a mini-batch is divided by: from its response tokens and its sequences, of all ranks.

    Sequences without response tokens are not counted. At least 1. ValueError on an unknown name.
    """
    divisors = {
        "token-mean": num_tokens,
        "seq-mean-token-mean": num_sequences,
        "seq-mean-token-sum": num_sequences,
        "constant": num_sequences * constant,
    }
    if aggregation not in divisors:
        raise ValueError(f"algorithm.loss_aggregation must be one of {', '.join(divisors)}, got {aggregation!r}")
    return float(max(1, divisors[aggregation]))
