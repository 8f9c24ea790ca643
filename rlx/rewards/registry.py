"""The table of verifiers. A new one is a file beside this one and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rlx.config.schema import RewardConfig
from rlx.rewards.base import Verifier
from rlx.rewards.code import CodeTests
from rlx.rewards.exact import ExactMatch
from rlx.rewards.format import FormatMatch
from rlx.rewards.http import HttpScorer
from rlx.rewards.judge import JudgeModel
from rlx.rewards.length import LengthShape
from rlx.rewards.math import MathVerify
from rlx.rewards.model import ModelScorer
from rlx.rewards.numeric import NumericMatch
from rlx.rewards.python_function import PythonFunction
from rlx.rewards.regex import RegexMatch
from rlx.rewards.weighted import Part, WeightedSum

# What computes here runs in processes, what waits for a server in threads.
LOCAL: Mapping[str, Callable[..., Verifier]] = {
    "exact": ExactMatch,
    "regex": RegexMatch,
    "numeric": NumericMatch,
    "math": MathVerify,
    "format": FormatMatch,
    "length": LengthShape,
    "code": CodeTests,
}
REMOTE: Mapping[str, Callable[..., Verifier]] = {"http": HttpScorer, "model": ModelScorer, "judge": JudgeModel}
VERIFIERS: Mapping[str, Callable[..., Verifier]] = {**LOCAL, **REMOTE}
SUM = "sum"


def make_verifier(config: RewardConfig) -> Verifier:
    """The verifier that ``config.name`` names, built from ``config.args``; ValueError when either is wrong."""
    if config.name == SUM:
        return WeightedSum([part_of(one) for one in part_configs(config)])
    if ":" in config.name:
        return PythonFunction(config.name, config.args)
    if config.name not in VERIFIERS:
        known = ", ".join([*VERIFIERS, SUM])
        raise ValueError(f"reward.name must be one of {known}, or path/to/file.py:function; got {config.name!r}")
    try:
        return VERIFIERS[config.name](**config.args)
    except TypeError as error:
        raise ValueError(f"reward.args do not fit the verifier {config.name}: {error}") from error


def is_remote(config: RewardConfig) -> bool:
    """Whether a verdict is waiting for a server rather than computing; a sum is remote if a part is."""
    if config.name == SUM:
        return any(is_remote(part.config) for part in part_configs(config))
    return config.name in REMOTE


class PartConfig:
    """One part of a sum as configured: ``{name, args, weight, called}``; ``called`` is its name in the metrics."""

    def __init__(self, row: object, whole: RewardConfig) -> None:
        if (
            not isinstance(row, Mapping)
            or not isinstance(row.get("name"), str)
            or set(row) - {"name", "args", "weight", "called"}
        ):
            raise ValueError(f"reward.args.parts: each part has name and perhaps args, weight and called; got {row!r}")
        weight = row.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"reward.args.parts: weight must be a number, got {weight!r}")
        self.config = replace(whole, name=row["name"], args=row.get("args", {}))
        self.called = str(row.get("called", row["name"].rpartition(":")[2]))
        self.weight = float(weight)


def part_configs(config: RewardConfig) -> list[PartConfig]:
    """The parts of a sum; ValueError when there are none, or two have one name."""
    rows = config.args.get("parts")
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows or set(config.args) != {"parts"}:
        raise ValueError(f"reward.args: sum needs parts, a list of {{name, args, weight}}; got {config.args!r}")
    parts = [PartConfig(row, config) for row in rows]
    names = [part.called for part in parts]
    if len(set(names)) != len(names):
        raise ValueError(f"reward.args.parts: the names {names} must differ; give some a 'called'")
    return parts


def part_of(part: PartConfig) -> Part:
    """The verifier of one part."""
    return Part(name=part.called, weight=part.weight, verifier=make_verifier(part.config))
