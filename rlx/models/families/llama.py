"""Llama 2, 3, 3.1 and models that follow its names (DeepSeek-LLM, Yi)."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.models.architecture import Architecture, ConfigJson, common_fields, refuse
from rlx.models.weights import QKV, Copy, Gated, Row, Vocab

_LAYER = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "attention_bias", False, None)
    refuse(config, "mlp_bias", False, None)
    refuse(config, "pretraining_tp", 1, None)
    return Architecture(**common_fields(config))


def table(arch: Architecture) -> Mapping[str, Row]:
    """The rows that every decoder of this lineage shares."""
    rows: dict[str, Row] = {
        "embedding.word_embeddings.weight": Vocab("model.embed_tokens.weight"),
        _LAYER + "input_layernorm.weight": Copy(_HF + "input_layernorm.weight", _hidden),
        _LAYER + "self_attention.linear_qkv.weight": QKV(
            _HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"
        ),
        _LAYER + "self_attention.linear_proj.weight": Copy(_HF + "self_attn.o_proj.weight", _projection, dim=1),
        _LAYER + "pre_mlp_layernorm.weight": Copy(_HF + "post_attention_layernorm.weight", _hidden),
        _LAYER + "mlp.linear_fc1.weight": Gated(_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        _LAYER + "mlp.linear_fc2.weight": Copy(_HF + "mlp.down_proj.weight", _down, dim=1),
        "decoder.final_layernorm.weight": Copy("model.norm.weight", _hidden),
    }
    if not arch.tied_embeddings:
        rows["output_layer.weight"] = Vocab("lm_head.weight")
    return rows


def _hidden(arch: Architecture) -> tuple[int, ...]:
    return (arch.hidden_size,)


def _projection(arch: Architecture) -> tuple[int, ...]:
    return arch.hidden_size, arch.num_heads * arch.head_dim


def _down(arch: Architecture) -> tuple[int, ...]:
    return arch.hidden_size, arch.ffn_hidden_size
