"""Where a model or a data set is: a path, or the local copy of the hub's by its id ``owner/name`` (data: ``owner/name:split``).

What is here is never looked for on the hub. The hub's client takes a second to import, so it is only when there is an id.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from rlx.config.convert import Problems
from rlx.config.schema import Config
from rlx.config.sources import FILE_ENDINGS, EvaluationSetConfig, SourceConfig

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT = re.compile(rf"({_ID.pattern})(?::((?:[\w.-]+/)?[\w.-]+))?")
_MODELS = ("path", "reference_path", "critic_path", "tokenizer_path")
Place = TypeVar("Place", SourceConfig, EvaluationSetConfig)


def model_folder(key: str, name: str, *, weights: bool = True) -> Path:
    """The folder ``name``, or that of the hub's model of this id, downloaded unless it is. ``weights`` false: its tokenizer's.

    Raises ValueError naming ``key`` for what is neither, and ConnectionError for an id that cannot be downloaded.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name) or not _ID.fullmatch(name):
        raise ValueError(f"{key}: no such folder {name}, and no hub id of the form owner/name")
    found: Path = import_module("rlx.config.hub.download").download_model(key, name, weights)
    return found


def data_path(key: str, name: str) -> str:
    """``name``, or the file (or the folder of files) of the hub's data set ``owner/name:split``; errors as ``model_folder``."""
    found = None if os.path.exists(name) or name.endswith(FILE_ENDINGS) else _SPLIT.fullmatch(name)
    return name if found is None else str(import_module("rlx.config.hub.download").download_split(key, found[1], found[2]))


def located(config: Config, problems: Problems) -> Config:
    """The configuration with every hub id replaced by the path of its local copy; what cannot be found is a problem."""

    def at(key: str, name: str | None, find: Callable[[str, str], object]) -> str | None:
        try:
            return name if name is None else str(find(key, name))
        except (ValueError, OSError) as error:
            problems.add(key, str(error).removeprefix(f"{key}: "))
            return name

    def model(key: str, name: str) -> object:
        if os.path.exists(name) or not _ID.fullmatch(name):
            return name  # the checks have more to say about folders
        return model_folder(key, name, weights=key != "model.tokenizer_path")

    def places(section: str, rows: Mapping[str, Place]) -> dict[str, Place]:
        return {
            name: replace(row, path=at(f"{section}.{name}.path", row.path, data_path) or row.path) for name, row in rows.items()
        }

    found: dict[str, Any] = {key: at(f"model.{key}", getattr(config.model, key), model) for key in _MODELS}
    data, evaluation = config.data, config.evaluation
    return replace(
        config,
        model=replace(config.model, **found),
        data=replace(data, train=at("data.train", data.train, data_path), sources=places("data.sources", data.sources)),
        evaluation=replace(
            evaluation, data=at("evaluation.data", evaluation.data, data_path), sets=places("evaluation.sets", evaluation.sets)
        ),
    )
