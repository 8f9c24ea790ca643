"""What a model family is: its fields of config.json, how they become an architecture, its table of weight names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlx.arch.architecture import Architecture
from rlx.arch.fields import ConfigJson, Fields
from rlx.arch.weights import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """``fields`` are those of config.json that the family reads, ``ignored`` the names of those that change nothing;
    ``architecture`` is made from all of ``fields``, defaults filled in; ``table`` gives an architecture's rows by Megatron
    name. ``spelling`` brings a config.json into the form that ``fields`` describe, where there is another. ``without_fp8``: why
    engines cannot be given its weights in FP8, "" where they can."""

    fields: Fields
    architecture: Callable[[ConfigJson], Architecture]
    table: Callable[[Architecture], Mapping[str, Row]]
    ignored: frozenset[str] = frozenset()
    spelling: Callable[[ConfigJson], ConfigJson] = dict
    without_fp8: str = ""
