"""Qwen2 and Qwen2.5: Llama's rows and biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.models.architecture import Architecture, ConfigJson, common_fields, refuse
from rlx.models.families import llama
from rlx.models.weights import QKV, Row

_HF = "model.layers.{layer}.self_attn."


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "use_sliding_window", False, None)
    return Architecture(**common_fields(config), qkv_bias=True)


def table(arch: Architecture) -> Mapping[str, Row]:
    bias = QKV(_HF + "q_proj.bias", _HF + "k_proj.bias", _HF + "v_proj.bias", bias=True)
    return {**llama.table(arch), "decoder.layers.{layer}.self_attention.linear_qkv.bias": bias}
