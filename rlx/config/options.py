"""How a field of the schema is declared: default, help, allowed values, limits; which one a misspelt key most likely meant."""

from __future__ import annotations

import operator
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from difflib import SequenceMatcher
from typing import Any, TypedDict, Unpack, cast


class Limits(TypedDict, total=False):
    """What a number must be: at least, above, at most, below. Where a key does not say, it is bounded by its type: a number that
    overflows, or asks for the impossible, must not be found out about by a process that was started with it."""

    minimum: float
    above: float
    maximum: float
    below: float


LARGEST: Mapping[type, float] = {int: 2**31 - 1, float: 1e9}
_HOLDS: Mapping[str, tuple[str, Callable[[float, float], bool]]] = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def option(default: Any, doc: str, *, choices: tuple[str, ...] = (), may_be_empty: bool = False, **limits: Unpack[Limits]) -> Any:
    """A documented field; mutable defaults are copied for each instance. Of a text that is empty, ``may_be_empty`` says that it
    means something: a path, or the name of a column, is never that."""
    metadata = {"doc": doc, "choices": choices, "may_be_empty": may_be_empty, "limits": limits}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(doc: str) -> Any:
    """A documented field without a default: leaving it out is an error that names it."""
    return field(metadata={"doc": doc, "choices": (), "may_be_empty": False, "limits": Limits()})


def by_algorithm(doc: str, *, choices: tuple[str, ...] = (), **limits: Unpack[Limits]) -> Any:
    """A field whose default depends on ``algorithm.name``; it is never None once the section is made."""
    return option(None, f"{doc} (default: the algorithm's own)", choices=choices, **limits)


def limit_words(limits: Limits) -> list[str]:
    """The limits in words: ``at least 1``."""
    return [f"{_HOLDS[name][0]} {bound:g}" for name, bound in cast(Mapping[str, float], limits).items()]


def broken_limits(value: float, limits: Limits) -> list[str]:
    """Which limits a number does not keep, in words; those of its type count where ``limits`` has none."""
    largest = LARGEST[type(value)]
    low: Limits = {} if {"minimum", "above"} & limits.keys() else {"minimum": -largest}
    high: Limits = {} if {"maximum", "below"} & limits.keys() else {"maximum": largest}
    bounds = cast(Mapping[str, float], {**limits, **low, **high})
    return [f"{_HOLDS[name][0]} {bound:.10g}" for name, bound in bounds.items() if not _HOLDS[name][1](value, bound)]


# Of 2: names that share a few letters by chance stay below.
_NEAR = 1.3


def nearest_key(key: str, known: Iterable[str]) -> str:
    """The known dotted key closest to ``key``. The last part counts as much as the whole, so that a right name
    in the wrong section finds its home. Raises ValueError when ``known`` is empty."""
    return max(known, key=lambda candidate: _likeness(key, candidate))


def is_near(key: str, candidate: str) -> bool:
    """Whether ``candidate`` may be what whoever wrote ``key`` meant: the same name elsewhere, or one spelt much like it."""
    return key.rpartition(".")[2] == candidate.rpartition(".")[2] or _likeness(key, candidate) >= _NEAR


def _likeness(left: str, right: str) -> float:
    whole = SequenceMatcher(None, left, right).ratio()
    last = SequenceMatcher(None, left.rpartition(".")[2], right.rpartition(".")[2]).ratio()
    return whole + last


def positive(text: str) -> int:
    """A whole number above 0, of a command line."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"must be at least 1, got {value}")
    return value
