"""What DeepSeek-V2 and V3 share: latent attention, its rows, and the fields both read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlx.arch.architecture import Architecture, common_fields, rope_parameters
from rlx.arch.families import llama
from rlx.arch.families.deepseek import DEEPSEEK
from rlx.arch.families.experts import ExpertNames, expert_rows
from rlx.arch.fields import ConfigJson, Fields, flag, refuse, whole
from rlx.arch.latent import Latent, read_yarn
from rlx.arch.weights import Copy, Row

LATENT: Fields = {
    **DEEPSEEK,
    "q_lora_rank": whole(1536, null=True),
    "kv_lora_rank": whole(512),
    "qk_nope_head_dim": whole(128),
    "qk_rope_head_dim": whole(64),
    "qk_head_dim": whole(None),
    "v_head_dim": whole(128),
    "rope_interleave": flag(True, null=True),
}
WITHOUT_FP8 = "SGLang derives further matrices from those of latent attention as it loads them"
_ATTENTION = "decoder.layers.{layer}.self_attention."
_HF = "model.layers.{layer}.self_attn."


def latent_fields(config: ConfigJson) -> dict[str, Any]:
    """Fields of an architecture with latent attention."""
    refuse(config, "attention_bias", False)
    refuse(config, "rope_interleave", True, None)
    refuse(config, "pretraining_tp", 1, None)
    # Both generations norm the compressed query and key-value with this value, whatever the other norms have.
    refuse(config, "rms_norm_eps", 1e-6)
    rope = rope_parameters(config)
    if rope["rope_type"] not in ("default", "yarn"):
        raise ValueError(f"config.json has rope type {rope['rope_type']!r}; supported for latent attention: 'default', 'yarn'")
    is_yarn = rope["rope_type"] == "yarn"
    latent = Latent(
        query_rank=config["q_lora_rank"],
        kv_rank=config["kv_lora_rank"],
        plain_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        yarn=read_yarn(rope) if is_yarn else None,
    )
    refuse(config, "qk_head_dim", latent.plain_dim + latent.rope_dim, None)
    plain_rope = {"rope_scaling": None, "rope_parameters": {"rope_theta": rope["rope_theta"]}} if is_yarn else {}
    heads = {"num_key_value_heads": config["num_attention_heads"], "head_dim": latent.rope_dim}
    return {**common_fields({**config, **plain_rope, **heads}), "latent": latent}


def table(arch: Architecture) -> Mapping[str, Row]:
    assert arch.latent is not None and arch.experts is not None
    rows = {**llama.table(arch), **expert_rows(arch.experts, ExpertNames())}
    del rows[_ATTENTION + "linear_qkv.weight"]
    if arch.latent.query_rank is None:
        rows[_ATTENTION + "linear_q_proj.weight"] = Copy(_HF + "q_proj.weight", _query_up, dim=0)
    else:
        rows[_ATTENTION + "linear_q_down_proj.weight"] = Copy(_HF + "q_a_proj.weight", _query_down)
        rows[_ATTENTION + "q_layernorm.weight"] = Copy(_HF + "q_a_layernorm.weight", _query_norm)
        rows[_ATTENTION + "linear_q_up_proj.weight"] = Copy(_HF + "q_b_proj.weight", _query_up, dim=0)
    rows[_ATTENTION + "linear_kv_down_proj.weight"] = Copy(_HF + "kv_a_proj_with_mqa.weight", _kv_down)
    rows[_ATTENTION + "kv_layernorm.weight"] = Copy(_HF + "kv_a_layernorm.weight", _kv_norm)
    rows[_ATTENTION + "linear_kv_up_proj.weight"] = Copy(_HF + "kv_b_proj.weight", _kv_up, dim=0)
    rows[_ATTENTION + "linear_proj.weight"] = Copy(_HF + "o_proj.weight", _projection, dim=1)
    return rows


def _latent(arch: Architecture) -> Latent:
    assert arch.latent is not None
    return arch.latent


def _query_rank(arch: Architecture) -> int:
    rank = _latent(arch).query_rank
    assert rank is not None
    return rank


def _query_down(arch: Architecture) -> tuple[int, ...]:
    return _query_rank(arch), arch.hidden_size


def _query_norm(arch: Architecture) -> tuple[int, ...]:
    return (_query_rank(arch),)


def _query_up(arch: Architecture) -> tuple[int, ...]:
    latent = _latent(arch)
    width = arch.hidden_size if latent.query_rank is None else latent.query_rank
    return arch.num_heads * (latent.plain_dim + latent.rope_dim), width


def _kv_down(arch: Architecture) -> tuple[int, ...]:
    return _latent(arch).kv_rank + _latent(arch).rope_dim, arch.hidden_size


def _kv_norm(arch: Architecture) -> tuple[int, ...]:
    return (_latent(arch).kv_rank,)


def _kv_up(arch: Architecture) -> tuple[int, ...]:
    latent = _latent(arch)
    return arch.num_heads * (latent.plain_dim + latent.value_dim), latent.kv_rank


def _projection(arch: Architecture) -> tuple[int, ...]:
    return arch.hidden_size, arch.num_heads * _latent(arch).value_dim
