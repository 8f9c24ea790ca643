"""Gemma 2 (Gemma Team 2024): four norms a layer, soft-capped scores and logits, a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping

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
from rlx.arch.weights import Copy, Row

FIELDS = words(
    """
    hidden_activation query_pre_attn_scalar sliding_window sliding_window_size layer_types attention_bias
    attn_logit_softcapping final_logit_softcapping use_bidirectional_attention
    """
)
# transformers' own, where config.json says nothing.
_DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def architecture(config: ConfigJson) -> Architecture:
    config = {**_DEFAULTS, **config}
    refuse(config, "use_bidirectional_attention", False, None)
    refuse(config, "attention_bias", True, False, None)
    refuse(config, "sliding_window_size", config["sliding_window"], None)  # the window's name in the first releases
    num_layers, bias = int(require(config, "num_hidden_layers")), bool(config.get("attention_bias"))
    alternating = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]
    fields = common_fields(config, activation="hidden_activation")
    return Architecture(
        **fields,
        **window_fields(config["sliding_window"], config.get("layer_types") or alternating, num_layers),
        qkv_bias=bias,
        projection_bias=bias,
        attention_scale=float(require(config, "query_pre_attn_scalar")) ** -0.5,
        attention_softcap=config["attn_logit_softcapping"],
        final_softcap=config["final_logit_softcapping"],
        zero_centered_norm=True,
        post_norms=True,
        embedding_scale=fields["hidden_size"] ** 0.5,
    )


def table(arch: Architecture) -> Mapping[str, Row]:
    layer, hf = "decoder.layers.{layer}.", "model.layers.{layer}."
    norms = {
        layer + "self_attn_bda.weight": Copy(hf + "post_attention_layernorm.weight", llama.hidden),
        layer + "pre_mlp_layernorm.weight": Copy(hf + "pre_feedforward_layernorm.weight", llama.hidden),
        layer + "mlp_bda.weight": Copy(hf + "post_feedforward_layernorm.weight", llama.hidden),
    }
    return {**llama.table(arch), **norms}
