"""The table of model families. A new one is a file beside this one and a row here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlx.arch.architecture import Architecture, check_numbers, read_config_json
from rlx.arch.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    gemma2,
    llama,
    mixtral,
    phi3,
    qwen2,
    qwen2_5_vl,
    qwen2_moe,
    qwen2_vl,
    qwen3,
    qwen3_moe,
)
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, check_described, complete, require
from rlx.arch.weights import Row

FAMILIES: Mapping[str, Family] = {
    "deepseek": deepseek.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "gemma2": gemma2.FAMILY,
    "llama": llama.FAMILY,
    "mixtral": mixtral.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen2_vl": qwen2_vl.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder. ValueError names a field that is missing, unknown or not supported."""
    config = read_config_json(folder)
    try:
        return architecture_of(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def architecture_of(config: ConfigJson) -> Architecture:
    """The architecture that a config.json describes; ValueError as ``read_architecture``."""
    model_type = require(config, "model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json has model_type {model_type!r}; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    arch = check_numbers(family.architecture(complete(family.spelling(config), family.fields, family.ignored)))
    check_described(config, arch.vocab_size)
    return arch


def weight_table(arch: Architecture) -> Mapping[str, Row]:
    """Megatron parameter name (``{layer}`` for the layer number) to row."""
    return FAMILIES[arch.model_type].table(arch)
