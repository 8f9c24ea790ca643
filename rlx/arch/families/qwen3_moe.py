"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen3's attention, experts without a shared one."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.arch.architecture import Architecture, Experts, common_fields
from rlx.arch.families import llama, qwen2
from rlx.arch.families.experts import ROUTING_NAMES, SPARSE_STEPS, ExpertNames, expert_rows, sparse_step_layers
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, decoder, flag, whole
from rlx.arch.weights import Row

FIELDS = decoder(
    {
        **qwen2.QWEN,
        **SPARSE_STEPS,
        "num_key_value_heads": whole(4),
        "attention_bias": flag(False),
        "num_experts": whole(128, alias="num_local_experts"),
        "num_experts_per_tok": whole(8),
        "moe_intermediate_size": whole(768),
    },
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=24,
    max_position_embeddings=32768,
)


def architecture(config: ConfigJson) -> Architecture:
    experts = Experts(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        hidden_size=config["moe_intermediate_size"],
        layers=sparse_step_layers(config),
        normalise=config["norm_topk_prob"],
    )
    bias = config["attention_bias"]
    # Unlike Qwen3: all layers or none, whatever ``max_window_layers`` says.
    window = config["sliding_window"] if config["use_sliding_window"] else None
    fields = common_fields(config)
    return Architecture(**fields, qk_norm=True, qkv_bias=bias, projection_bias=bias, window=window, experts=experts)


def table(arch: Architecture) -> Mapping[str, Row]:
    assert arch.experts is not None
    return {**llama.table(arch), **expert_rows(arch.experts, ExpertNames())}


FAMILY = Family(fields=FIELDS, architecture=architecture, table=table, ignored=ROUTING_NAMES)
