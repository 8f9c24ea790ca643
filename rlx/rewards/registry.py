"""The table of verifiers. A new one is a file beside this one and a row here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import get_args, get_type_hints

from rlx.config.options import Limits, broken_limits
from rlx.config.schema import RewardConfig
from rlx.rewards.base import Verifier
from rlx.rewards.by_source import BySource
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
from rlx.rewards.reasoning_gym import ReasoningGym
from rlx.rewards.regex import RegexMatch
from rlx.rewards.remote import Poster
from rlx.rewards.weighted import Part, WeightedSum
from rlx.types.rollout import LabelUse

# What computes here runs in processes, what waits for a server in threads.
LOCAL: Mapping[str, Callable[..., Verifier]] = {
    "exact": ExactMatch,
    "regex": RegexMatch,
    "numeric": NumericMatch,
    "math": MathVerify,
    "format": FormatMatch,
    "length": LengthShape,
    "code": CodeTests,
    "reasoning-gym": ReasoningGym,
}
REMOTE: Mapping[str, Callable[..., Verifier]] = {"http": HttpScorer, "model": ModelScorer, "judge": JudgeModel}
VERIFIERS: Mapping[str, Callable[..., Verifier]] = {**LOCAL, **REMOTE}
# These can say nothing of a prompt without a label.
COMPARING = ("exact", "numeric", "math")
# These can do without one, but a label that is no text means nothing to them.
SHOWING = ("regex", "judge")
SUM, BY_SOURCE = "sum", "by_source"


def make_verifier(config: RewardConfig) -> Verifier:
    """The verifier that ``config.name`` names, built from ``config.args``; ValueError when either is wrong."""
    if config.name == SUM:
        return WeightedSum([part_of(one) for one in part_configs(config)])
    if config.name == BY_SOURCE:
        named, otherwise = source_configs(config)
        return BySource(
            sources={source: make_verifier(one) for source, one in named.items()},
            otherwise=None if otherwise is None else make_verifier(otherwise),
        )
    if ":" in config.name:
        return PythonFunction(config.name, config.args)
    if config.name not in VERIFIERS:
        known = ", ".join([*VERIFIERS, SUM, BY_SOURCE])
        raise ValueError(f"reward.name must be one of {known}, or path/to/file.py:function; got {config.name!r}")
    _check_arguments(config)
    try:
        return VERIFIERS[config.name](**config.args)
    except TypeError as error:
        raise ValueError(f"reward.args do not fit the verifier {config.name}: {error}") from error


# What a number under one of these names must be, whichever verifier takes it.
_LIMITS: Mapping[str, Limits] = {
    "timeout_s": {"above": 0},
    "pause_s": {"minimum": 0},
    "max_wait_s": {"minimum": 0},
    "max_retries": {"minimum": 0},
    "memory_mb": {"minimum": 1},
    "batch_size": {"minimum": 1},
    "max_tokens": {"minimum": 1},
    "temperature": {"minimum": 0},
    "scale": {"above": 0},
    "label_index": {"minimum": 0},
}


def _check_arguments(config: RewardConfig) -> None:
    """ValueError for an argument of another kind than the verifier declares, or a number beyond its limits."""
    kinds = {**get_type_hints(Poster), **get_type_hints(VERIFIERS[config.name].__init__)}
    for name, value in config.args.items():
        wanted = {kind for kind in (get_args(kinds.get(name)) or (kinds.get(name),)) if kind in (bool, int, float, str, NoneType)}
        found = type(value)
        if wanted and found not in wanted and not (found is int and float in wanted):
            words = " or ".join(sorted(kind.__name__ for kind in wanted))
            raise ValueError(f"reward.args.{name}: {config.name} expects {words}, got {value!r}")
        if found in (int, float):
            for words in broken_limits(value, _LIMITS.get(name, {})):
                raise ValueError(f"reward.args.{name}: must be {words}, got {value}")


def label_use(config: RewardConfig, source: str) -> LabelUse:
    """What the verifiers of a prompt of ``source`` do with its label."""
    names = list(_names_for(config, source))
    return LabelUse(
        is_needed=any(name in COMPARING for name in names),
        is_compared=any(name in (*COMPARING, *SHOWING) for name in names),
        is_handed_on=any(":" in name for name in names),
    )


def _names_for(config: RewardConfig, source: str) -> Iterator[str]:
    """The verifiers of a prompt of ``source``, sums taken apart."""
    if config.name == SUM:
        for part in part_configs(config):
            yield from _names_for(part.config, source)
    elif config.name == BY_SOURCE:
        named, otherwise = source_configs(config)
        own = named.get(source, otherwise)
        yield from () if own is None else _names_for(own, source)
    else:
        yield config.name


def user_functions(config: RewardConfig) -> Iterator[str]:
    """The verifiers that are functions of the user's own, ``path/to/file.py:function``, wherever they stand."""
    if config.name == SUM:
        below = [part.config for part in part_configs(config)]
    elif config.name == BY_SOURCE:
        named, otherwise = source_configs(config)
        below = [*named.values(), *([] if otherwise is None else [otherwise])]
    else:
        below = []
        if ":" in config.name:
            yield config.name
    for one in below:
        yield from user_functions(one)


def is_remote(config: RewardConfig) -> bool:
    """Whether a verdict is waiting for a server rather than computing; a sum, or by_source, is remote if a part is."""
    return any(_parts_are_remote(config))


def is_mixed(config: RewardConfig) -> bool:
    """Whether some parts wait for a server and others compute."""
    return len(set(_parts_are_remote(config))) > 1


def _parts_are_remote(config: RewardConfig) -> list[bool]:
    if config.name == SUM:
        return [remote for part in part_configs(config) for remote in _parts_are_remote(part.config)]
    if config.name == BY_SOURCE:
        named, otherwise = source_configs(config)
        rows = [*named.values(), *([] if otherwise is None else [otherwise])]
        return [remote for one in rows for remote in _parts_are_remote(one)]
    return [config.name in REMOTE]


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
        if isinstance(weight, bool) or not isinstance(weight, int | float) or broken_limits(weight, {}):
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


def source_configs(config: RewardConfig) -> tuple[Mapping[str, RewardConfig], RewardConfig | None]:
    """The verifiers of by_source as configured, by source, and the one for any other; ValueError when there are none."""
    rows = config.args.get("sources", {})
    if not isinstance(rows, Mapping) or not rows or set(config.args) - {"sources", "otherwise"}:
        raise ValueError(
            f"reward.args: by_source needs sources, a mapping of source names to {{name, args}}, and perhaps otherwise;"
            f" got {config.args!r}"
        )
    named = {str(source): _source_config(f"sources.{source}", row, config) for source, row in rows.items()}
    otherwise = config.args.get("otherwise")
    return named, None if otherwise is None else _source_config("otherwise", otherwise, config)


def _source_config(key: str, row: object, whole: RewardConfig) -> RewardConfig:
    if not isinstance(row, Mapping) or not isinstance(row.get("name"), str) or set(row) - {"name", "args"}:
        raise ValueError(f"reward.args.{key}: expected name and perhaps args; got {row!r}")
    one = replace(whole, name=row["name"], args=row.get("args", {}))
    if one.name == BY_SOURCE or is_mixed(one):
        raise ValueError(f"reward.args.{key}: {one.name} of several kinds cannot stand here; name its verifiers' sources instead")
    return one
