"""Phi-3 mini and medium: Llama's rows, stored fused; a window in every layer; LongRoPE for 128k tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlx.arch.architecture import Architecture, common_fields, rope_parameters, window_fields
from rlx.arch.families import llama
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, decoder, flag, number, refuse, require, whole, words
from rlx.arch.longrope import LongRope
from rlx.arch.weights import QKV, Gated, Row, Stacked

FIELDS = decoder(
    {
        "sliding_window": whole(None),
        "original_max_position_embeddings": whole(4096),
        "resid_pdrop": number(0.0),
        "embd_pdrop": number(0.0),
        "attention_bias": flag(False),
    },
    vocab_size=32064,
    hidden_size=3072,
    intermediate_size=8192,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
_LONGROPE_NAMES = ("longrope", "su", "yarn")  # earlier releases of Phi-3 say the last two and mean the first


def architecture(config: ConfigJson) -> Architecture:
    for name in ("resid_pdrop", "embd_pdrop"):
        refuse(config, name, 0)
    refuse(config, "attention_bias", False)
    num_layers, window = config["num_hidden_layers"], config["sliding_window"]
    kind = "full_attention" if window is None else "sliding_attention"
    fields: dict[str, Any] = {}
    scaling = rope_parameters(config)
    if scaling["rope_type"] in _LONGROPE_NAMES:
        fields["rope"] = _longrope(config, scaling)
        config = {**config, "rope_scaling": None, "rope_parameters": {"rope_theta": scaling["rope_theta"]}}
    return Architecture(**common_fields(config) | fields, **window_fields(window, [kind] * num_layers, num_layers))


def _longrope(config: ConfigJson, scaling: Mapping[str, Any]) -> LongRope:
    original = config["original_max_position_embeddings"]  # wins over the one in the scaling, as in transformers
    stretch = float(scaling.get("factor") or config["max_position_embeddings"] / original)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    known = words("rope_type rope_theta short_factor long_factor factor attention_factor original_max_position_embeddings")
    unknown = sorted(scaling.keys() - known)
    if unknown:
        raise ValueError(f"config.json has {', '.join(unknown)} in its rope parameters, which Phi-3's longrope does not know")
    half = (config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]) // 2
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


FAMILY = Family(
    fields=FIELDS,
    architecture=architecture,
    table=table,
    without_fp8="its projections are stored fused, and blocks of their scales would have to be split again",
)
