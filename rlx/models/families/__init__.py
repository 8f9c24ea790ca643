"""One file a model family: its table of weight names and how its configuration is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlx.models.architecture import Architecture, ConfigJson, read_config_json, require
from rlx.models.families import llama, qwen2
from rlx.models.weights import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """``architecture`` reads a config.json; ``table`` gives the rows of one architecture by Megatron name."""

    architecture: Callable[[ConfigJson], Architecture]
    table: Callable[[Architecture], Mapping[str, Row]]


FAMILIES: Mapping[str, Family] = {
    "llama": Family(architecture=llama.architecture, table=llama.table),
    "qwen2": Family(architecture=qwen2.architecture, table=qwen2.table),
}


def family_of(config: ConfigJson) -> Family:
    """The family of a config.json, by its ``model_type``. ValueError names the supported ones."""
    model_type = require(config, "model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json has model_type {model_type!r}; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder."""
    config = read_config_json(folder)
    return family_of(config).architecture(config)


def weight_table(arch: Architecture) -> Mapping[str, Row]:
    """Megatron parameter name (``{layer}`` for the layer number) to row."""
    return FAMILIES[arch.model_type].table(arch)
