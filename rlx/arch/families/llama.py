"""Llama 2, 3, 3.1 and models that follow its names (DeepSeek-LLM, Yi)."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.arch.architecture import Architecture, common_fields
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, decoder, flag, refuse, whole
from rlx.arch.weights import (
    QKV,
    Copy,
    Gated,
    Row,
    Vocab,
)

FIELDS = decoder({"attention_bias": flag(False), "mlp_bias": flag(False), "pretraining_tp": whole(1, null=True)})

_LAYER = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def architecture(config: ConfigJson) -> Architecture:
    # Splits matrix products to repeat the rounding of a training run; transformers computes without it as well.
    refuse(config, "pretraining_tp", 1, None)
    bias = config["attention_bias"]
    return Architecture(**common_fields(config), qkv_bias=bias, projection_bias=bias, mlp_bias=config["mlp_bias"])


def table(arch: Architecture) -> Mapping[str, Row]:
    """The rows that every decoder of this lineage shares; biases and query-key norms where the architecture has them."""
    rows: dict[str, Row] = {
        "embedding.word_embeddings.weight": Vocab("model.embed_tokens.weight"),
        _LAYER + "input_layernorm.weight": Copy(_HF + "input_layernorm.weight", hidden),
        _LAYER + "self_attention.linear_qkv.weight": QKV(
            _HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"
        ),
        _LAYER + "self_attention.linear_proj.weight": Copy(_HF + "self_attn.o_proj.weight", _projection, dim=1),
        _LAYER + "pre_mlp_layernorm.weight": Copy(_HF + "post_attention_layernorm.weight", hidden),
        _LAYER + "mlp.linear_fc1.weight": Gated(_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        _LAYER + "mlp.linear_fc2.weight": Copy(_HF + "mlp.down_proj.weight", _down, dim=1),
        "decoder.final_layernorm.weight": Copy("model.norm.weight", hidden),
    }
    if arch.qkv_bias:
        query, key, value = (_HF + f"self_attn.{part}_proj.bias" for part in "qkv")
        rows[_LAYER + "self_attention.linear_qkv.bias"] = QKV(query, key, value, bias=True)
    if arch.projection_bias:
        rows[_LAYER + "self_attention.linear_proj.bias"] = Copy(_HF + "self_attn.o_proj.bias", hidden)
    if arch.mlp_bias:
        rows[_LAYER + "mlp.linear_fc1.bias"] = Gated(_HF + "mlp.gate_proj.bias", _HF + "mlp.up_proj.bias", bias=True)
        rows[_LAYER + "mlp.linear_fc2.bias"] = Copy(_HF + "mlp.down_proj.bias", hidden)
    if arch.qk_norm:
        rows[_LAYER + "self_attention.q_layernorm.weight"] = Copy(_HF + "self_attn.q_norm.weight", _head)
        rows[_LAYER + "self_attention.k_layernorm.weight"] = Copy(_HF + "self_attn.k_norm.weight", _head)
    if not arch.tied_embeddings:
        rows["output_layer.weight"] = Vocab("lm_head.weight")
    return rows


def hidden(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size,)


def _head(arch: Architecture) -> tuple[int, ...]:
    return (arch.head_dim,)


def _projection(arch: Architecture) -> tuple[int, ...]:
    return arch.hidden_size, arch.num_heads * arch.head_dim


def _down(arch: Architecture) -> tuple[int, ...]:
    return arch.hidden_size, arch.ffn_hidden_size


FAMILY = Family(
    fields=FIELDS,
    architecture=architecture,
    table=table,
    without_fp8="SGLang's loader of this family looks for the scales of blocks under another name and leaves them out",
)
