"""Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2's attention, experts and one gated shared expert."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.arch.architecture import Architecture, Experts, common_fields, window_fields
from rlx.arch.families import llama, qwen2
from rlx.arch.families.experts import ROUTING_NAMES, SPARSE_STEPS, ExpertNames, expert_rows, sparse_step_layers
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, decoder, flag, listed, refuse, whole
from rlx.arch.weights import Row

FIELDS = decoder(
    {
        **qwen2.QWEN,
        **SPARSE_STEPS,
        "sliding_window": whole(4096, minimum=0, null=True),  # transformers writes 0 for none
        "layer_types": listed(str),
        "qkv_bias": flag(True),
        "num_experts": whole(60, alias="num_local_experts"),
        "num_experts_per_tok": whole(4),
        "moe_intermediate_size": whole(1408),
        "shared_expert_intermediate_size": whole(5632),
    },
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=32768,
)


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "qkv_bias", True)
    experts = Experts(
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        hidden_size=config["moe_intermediate_size"],
        layers=sparse_step_layers(config),
        normalise=config["norm_topk_prob"],
        shared_hidden_size=config["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    num_layers, window = config["num_hidden_layers"], config["sliding_window"] if config["use_sliding_window"] else None
    # Unlike Qwen2: every other layer, up to ``max_window_layers``.
    windowed = range(0, config["max_window_layers"], 2) if config["use_sliding_window"] else ()
    kinds = ["sliding_attention" if layer in windowed else "full_attention" for layer in range(num_layers)]
    windows = window_fields(window, config["layer_types"] or kinds, num_layers)
    return Architecture(**common_fields(config), **windows, qkv_bias=True, experts=experts)


def table(arch: Architecture) -> Mapping[str, Row]:
    assert arch.experts is not None
    return {**llama.table(arch), **expert_rows(arch.experts, ExpertNames(shared="shared_expert"))}


FAMILY = Family(fields=FIELDS, architecture=architecture, table=table, ignored=ROUTING_NAMES)
