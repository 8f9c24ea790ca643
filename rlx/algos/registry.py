"""The table of algorithms. A new one is a file beside this one, a row here and its name in ``AlgorithmConfig.name``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlx.algos.base import Algorithm
from rlx.algos.grpo import make_grpo
from rlx.algos.ppo import make_ppo
from rlx.config.schema import AlgorithmConfig

ALGORITHMS: Mapping[str, Callable[[AlgorithmConfig], Algorithm]] = {
    "ppo": make_ppo,
    "grpo": make_grpo,
}


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that ``config.name`` names; ValueError with the known names otherwise."""
    if config.name not in ALGORITHMS:
        raise ValueError(f"algorithm.name must be one of {', '.join(ALGORITHMS)}, got {config.name!r}")
    return ALGORITHMS[config.name](config)
