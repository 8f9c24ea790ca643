"""One file a model family: its table of weight names and how its configuration is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlx.arch.architecture import (
    Architecture,
    ConfigJson,
    read_config_json,
    require,
)
from rlx.arch.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    gemma2,
    llama,
    mixtral,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from rlx.arch.fields import refuse_unknown_fields
from rlx.arch.weights import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """``architecture`` reads a config.json; ``table`` gives the rows of one architecture by Megatron name; ``fields`` are
    the names in config.json that the family knows beyond the common ones."""

    architecture: Callable[[ConfigJson], Architecture]
    table: Callable[[Architecture], Mapping[str, Row]]
    fields: frozenset[str]


FAMILIES: Mapping[str, Family] = {
    "deepseek": Family(architecture=deepseek.architecture, table=deepseek.table, fields=deepseek.FIELDS),
    "deepseek_v2": Family(architecture=deepseek_v2.architecture, table=deepseek_v2.table, fields=deepseek_v2.FIELDS),
    "deepseek_v3": Family(architecture=deepseek_v3.architecture, table=deepseek_v3.table, fields=deepseek_v3.FIELDS),
    "gemma2": Family(architecture=gemma2.architecture, table=gemma2.table, fields=gemma2.FIELDS),
    "llama": Family(architecture=llama.architecture, table=llama.table, fields=llama.FIELDS),
    "mixtral": Family(architecture=mixtral.architecture, table=mixtral.table, fields=mixtral.FIELDS),
    "phi3": Family(architecture=phi3.architecture, table=phi3.table, fields=phi3.FIELDS),
    "qwen2": Family(architecture=qwen2.architecture, table=qwen2.table, fields=qwen2.FIELDS),
    "qwen2_moe": Family(architecture=qwen2_moe.architecture, table=qwen2_moe.table, fields=qwen2_moe.FIELDS),
    "qwen3": Family(architecture=qwen3.architecture, table=qwen3.table, fields=qwen3.FIELDS),
    "qwen3_moe": Family(architecture=qwen3_moe.architecture, table=qwen3_moe.table, fields=qwen3_moe.FIELDS),
}


def family_of(config: ConfigJson) -> Family:
    """The family of a config.json, by its ``model_type``. ValueError names the supported ones."""
    model_type = require(config, "model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json has model_type {model_type!r}; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder. ValueError names a field that is missing, unknown or not supported."""
    config = read_config_json(folder)
    family = family_of(config)
    refuse_unknown_fields(config, family.fields)
    return family.architecture(config)


def weight_table(arch: Architecture) -> Mapping[str, Row]:
    """Megatron parameter name (``{layer}`` for the layer number) to row."""
    return FAMILIES[arch.model_type].table(arch)
