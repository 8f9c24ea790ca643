"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen3's attention, experts without a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rlx.arch.architecture import (
    Architecture,
    ConfigJson,
    Experts,
    require,
)
from rlx.arch.families import llama, qwen3
from rlx.arch.families.experts import (
    ROUTING_FIELDS,
    ExpertNames,
    expert_rows,
    num_experts,
    sparse_step_layers,
)
from rlx.arch.fields import words
from rlx.arch.weights import Row

FIELDS = (
    qwen3.FIELDS
    | ROUTING_FIELDS
    | words("num_experts num_local_experts moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers")
)


def architecture(config: ConfigJson) -> Architecture:
    experts = Experts(
        num_experts=num_experts(config),
        top_k=int(require(config, "num_experts_per_tok")),
        hidden_size=int(require(config, "moe_intermediate_size")),
        layers=sparse_step_layers(config),
        normalise=bool(config.get("norm_topk_prob", False)),
    )
    return replace(qwen3.architecture(config), experts=experts)


def table(arch: Architecture) -> Mapping[str, Row]:
    assert arch.experts is not None
    return {**llama.table(arch), **expert_rows(arch.experts, ExpertNames())}
