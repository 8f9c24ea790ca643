"""Gemma 2 (Gemma Team 2024): four norms a layer, soft-capped scores and logits, a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.arch.architecture import Architecture, common_fields, window_fields
from rlx.arch.families import llama
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, decoder, flag, listed, positive, refuse, text, whole
from rlx.arch.weights import Copy, Row

FIELDS = decoder(
    {
        "num_key_value_heads": whole(4),
        "head_dim": whole(256),
        "hidden_activation": text("gelu_pytorch_tanh"),
        "query_pre_attn_scalar": whole(256),
        "sliding_window": whole(4096, null=True),
        "sliding_window_size": whole(None),
        "layer_types": listed(str),
        "attention_bias": flag(False),
        "attn_logit_softcapping": positive(50.0, null=True),
        "final_logit_softcapping": positive(30.0, null=True),
        "use_bidirectional_attention": flag(None),
    },
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "use_bidirectional_attention", False, None)
    refuse(config, "sliding_window_size", config["sliding_window"], None)  # the window's name in the first releases
    num_layers, bias = config["num_hidden_layers"], config["attention_bias"]
    alternating = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]
    fields = common_fields(config, activation="hidden_activation")
    return Architecture(
        **fields,
        **window_fields(config["sliding_window"], config["layer_types"] or alternating, num_layers),
        qkv_bias=bias,
        projection_bias=bias,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
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


FAMILY = Family(fields=FIELDS, architecture=architecture, table=table)
