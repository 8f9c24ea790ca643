"""Whose turn it is in a mixture: pure arithmetic on shares.

With a share p of all prompts, the k-th prompt of a source (from 0) may come at the draws floor(k / p) to ceil((k + 1) / p) - 1.
Among the sources that may come, the one whose window closes first does. Earliest deadline first meets every window (Baruah et
al. 1996, proportionate progress), so after any n draws each source has had p n prompts to within one, whatever the weights.
There is nothing random in it: the counts alone resume it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor


def shares_of(weights: Sequence[float]) -> list[Fraction]:
    """Weights as exact shares of 1, a decimal such as 0.1 being a tenth. Raises ValueError for one that is not above 0."""
    if any(not weight > 0 for weight in weights):
        raise ValueError(f"weights must be above 0, got {list(weights)}")
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def next_source(shares: Sequence[Fraction], counts: Sequence[int]) -> int:
    """The index of the source that the next prompt comes from, after ``counts[i]`` prompts of each."""
    draw = sum(counts)
    windows = [(floor(count / share), ceil((count + 1) / share)) for share, count in zip(shares, counts, strict=True)]
    return min((end, index) for index, (start, end) in enumerate(windows) if start <= draw)[1]
