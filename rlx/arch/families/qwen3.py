"""Qwen3, dense: Llama's rows and norms on queries and keys, head by head."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.arch.architecture import (
    Architecture,
    ConfigJson,
    common_fields,
    refuse,
)
from rlx.arch.families import llama, qwen2
from rlx.arch.weights import Row

FIELDS = qwen2.FIELDS | {"attention_bias"}
_DEFAULTS = {"head_dim": 128}  # transformers' own, where config.json says nothing


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "attention_bias", True, False, None)
    bias = bool(config.get("attention_bias"))
    fields = common_fields({**_DEFAULTS, **config}) | qwen2.windows(config)
    return Architecture(**fields, qk_norm=True, qkv_bias=bias, projection_bias=bias)


def table(arch: Architecture) -> Mapping[str, Row]:
    return llama.table(arch)
