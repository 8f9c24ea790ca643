"""Qwen2 and Qwen2.5: Llama's rows and biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlx.arch.architecture import (
    Architecture,
    ConfigJson,
    common_fields,
    refuse,
    require,
    window_fields,
)
from rlx.arch.families import llama
from rlx.arch.fields import words
from rlx.arch.weights import Row

FIELDS = words("use_sliding_window sliding_window max_window_layers layer_types")


def architecture(config: ConfigJson) -> Architecture:
    return Architecture(**common_fields(config), **windows(config), qkv_bias=True)


def windows(config: ConfigJson) -> dict[str, Any]:
    """The windows of the Qwen lineage: the layers from ``max_window_layers`` on, or what ``layer_types`` says."""
    refuse(config, "use_sliding_window", True, False, None)
    num_layers = int(require(config, "num_hidden_layers"))
    layer_types = config.get("layer_types")
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    if layer_types is None:
        first = config.get("max_window_layers", 28) if window is not None else num_layers
        layer_types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    return window_fields(window, layer_types, num_layers)


def table(arch: Architecture) -> Mapping[str, Row]:
    return llama.table(arch)
