"""Phi-3 mini and medium: Llama's rows, stored fused; a window in every layer; LongRoPE for 128k tokens."""

from __future__ import annotations

import math
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
from rlx.arch.longrope import LongRope
from rlx.arch.weights import (
    QKV,
    Gated,
    Row,
    Stacked,
)

FIELDS = words("sliding_window original_max_position_embeddings resid_pdrop embd_pdrop attention_bias")
_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
_LONGROPE_NAMES = ("longrope", "su", "yarn")  # earlier releases of Phi-3 say the last two and mean the first


def architecture(config: ConfigJson) -> Architecture:
    config = {**_DEFAULTS, **config}
    for name in ("resid_pdrop", "embd_pdrop"):
        refuse(config, name, 0, 0.0, None)
    refuse(config, "attention_bias", False, None)
    num_layers, window = int(require(config, "num_hidden_layers")), config.get("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    fields: dict[str, Any] = {}
    if scaling.get("rope_type", scaling.get("type")) in _LONGROPE_NAMES:
        fields["rope"] = _longrope(config, scaling)
        plain = {name: scaling[name] for name in ("rope_theta", "partial_rotary_factor") if name in scaling}
        config = {**config, "rope_scaling": None, "rope_parameters": plain}
    return Architecture(**common_fields(config) | fields, **window_fields(window, [kind] * num_layers, num_layers))


def _longrope(config: ConfigJson, scaling: Mapping[str, Any]) -> LongRope:
    original = int(scaling.get("original_max_position_embeddings") or config["original_max_position_embeddings"])
    stretch = float(scaling.get("factor") or config["max_position_embeddings"] / original)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    known = words("rope_type type rope_theta partial_rotary_factor short_factor long_factor factor attention_factor")
    unknown = sorted(scaling.keys() - known - {"original_max_position_embeddings"})
    if unknown:
        raise ValueError(f"config.json has {', '.join(unknown)} in its rope parameters, which Phi-3's longrope does not know")
    half = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
    factors = {name: tuple(map(float, require(scaling, name))) for name in ("short_factor", "long_factor")}
    for name, values in factors.items():
        if len(values) != half:
            raise ValueError(f"config.json has {len(values)} numbers in {name}; a head of {2 * half} needs {half}")
    return LongRope(
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
        original_max_positions=original,
        attention_factor=float(attention_factor),
    )


def table(arch: Architecture) -> Mapping[str, Row]:
    layer, hf = "decoder.layers.{layer}.", "model.layers.{layer}."
    fused = {
        layer + "self_attention.linear_qkv.weight": Stacked(hf + "self_attn.qkv_proj.weight", QKV("q", "k", "v")),
        layer + "mlp.linear_fc1.weight": Stacked(hf + "mlp.gate_up_proj.weight", Gated("gate", "up")),
    }
    return {**llama.table(arch), **fused}
