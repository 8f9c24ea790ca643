"""The table of verifiers. A new one is a file beside this one and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlx.config.schema import RewardConfig
from rlx.rewards.base import Verifier
from rlx.rewards.exact import ExactMatch
from rlx.rewards.numeric import NumericMatch
from rlx.rewards.python_function import PythonFunction
from rlx.rewards.regex import RegexMatch

VERIFIERS: Mapping[str, Callable[..., Verifier]] = {
    "exact": ExactMatch,
    "regex": RegexMatch,
    "numeric": NumericMatch,
}


def make_verifier(config: RewardConfig) -> Verifier:
    """The verifier that ``config.name`` names, built from ``config.args``; ValueError when either is wrong."""
    if ":" in config.name:
        return PythonFunction(config.name, config.args)
    if config.name not in VERIFIERS:
        raise ValueError(f"reward.name must be one of {', '.join(VERIFIERS)}, or path/to/file.py:function; got {config.name!r}")
    try:
        return VERIFIERS[config.name](**config.args)
    except TypeError as error:
        raise ValueError(f"reward.args do not fit the verifier {config.name}: {error}") from error
