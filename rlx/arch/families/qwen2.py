"""Qwen2 and Qwen2.5: Llama's rows and biases on query, key and value."""

from __future__ import annotations

from typing import Any

from rlx.arch.architecture import Architecture, common_fields, window_fields
from rlx.arch.families import llama
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, Fields, decoder, flag, listed, whole

QWEN: Fields = {
    "use_sliding_window": flag(False),
    "sliding_window": whole(4096, null=True),
    "max_window_layers": whole(28, minimum=0),
}
"""How the Qwen lineage says which layers have a window."""
SIZES = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
FIELDS = decoder({**QWEN, "layer_types": listed(str)}, **SIZES)


def architecture(config: ConfigJson) -> Architecture:
    return Architecture(**common_fields(config), **windows(config), qkv_bias=True)


def windows(config: ConfigJson) -> dict[str, Any]:
    """The layers from ``max_window_layers`` on, or what ``layer_types`` says."""
    num_layers, layer_types = config["num_hidden_layers"], config["layer_types"]
    window = config["sliding_window"] if config["use_sliding_window"] else None
    if layer_types is None:
        first = config["max_window_layers"] if window is not None else num_layers
        layer_types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    return window_fields(window, layer_types, num_layers)


FAMILY = Family(fields=FIELDS, architecture=architecture, table=llama.table)
