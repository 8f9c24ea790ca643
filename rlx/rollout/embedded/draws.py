"""Random numbers by counter: the draw of (seed, position) is a pure function, whatever else shares the batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_BITS = 40


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIER_2
    return x ^ (x >> np.uint64(31))


def uniform_draws(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One draw in [0, 1) for each (seed, token position) pair; both arrays have shape [B].

    The draw has 40 bits, so that its product with any total of probabilities stays below that total in float64.
    """
    # Mixing the seed first keeps neighbouring seeds (the samples of one prompt) from sharing shifted streams.
    stream = _mix(seeds + _GOLDEN)
    word = _mix(stream + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (word >> np.uint64(64 - _BITS)).astype(np.float64) * 2.0**-_BITS
