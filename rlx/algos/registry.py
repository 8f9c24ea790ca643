"""The table of algorithms. A new one is a file beside this one, a row here and one in ``rlx.config.algorithm.PRESETS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlx.algos.base import Algorithm
from rlx.algos.cispo import make_cispo
from rlx.algos.dapo import make_dapo
from rlx.algos.dr_grpo import make_dr_grpo
from rlx.algos.grpo import make_grpo
from rlx.algos.gspo import make_gspo
from rlx.algos.named import try_named_parts, with_named_parts
from rlx.algos.ppo import make_ppo
from rlx.algos.prime import make_prime
from rlx.algos.reinforce_pp import make_reinforce_pp, make_reinforce_pp_baseline
from rlx.algos.remax import make_remax
from rlx.algos.rloo import make_rloo
from rlx.config.algorithm import AlgorithmConfig

ALGORITHMS: Mapping[str, Callable[[AlgorithmConfig], Algorithm]] = {
    "ppo": make_ppo,
    "grpo": make_grpo,
    "dr_grpo": make_dr_grpo,
    "dapo": make_dapo,
    "rloo": make_rloo,
    "reinforce_pp": make_reinforce_pp,
    "reinforce_pp_baseline": make_reinforce_pp_baseline,
    "remax": make_remax,
    "gspo": make_gspo,
    "cispo": make_cispo,
    "prime": make_prime,
}


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that ``config.name`` names, with the loss and advantages that ``config`` names; ValueError with the known
    names otherwise."""
    if config.name not in ALGORITHMS:
        raise ValueError(f"algorithm.name must be one of {', '.join(ALGORITHMS)}, got {config.name!r}")
    return with_named_parts(ALGORITHMS[config.name](config), config)


def try_algorithm(config: AlgorithmConfig) -> None:
    """ValueError for a named loss or advantage that a run could not use; it is called once."""
    try_named_parts(make_algorithm(config), config)
