"""Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2's attention, experts and one gated shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rlx.arch.architecture import (
    Architecture,
    ConfigJson,
    Experts,
    refuse,
    require,
)
from rlx.arch.families import qwen2
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
    qwen2.FIELDS
    | ROUTING_FIELDS
    | words("num_experts num_local_experts moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers")
    | words("shared_expert_intermediate_size qkv_bias")
)


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "qkv_bias", True, None)
    experts = Experts(
        num_experts=num_experts(config),
        top_k=int(require(config, "num_experts_per_tok")),
        hidden_size=int(require(config, "moe_intermediate_size")),
        layers=sparse_step_layers(config),
        normalise=bool(config.get("norm_topk_prob", False)),
        shared_hidden_size=int(require(config, "shared_expert_intermediate_size")),
        shared_gate=True,
    )
    return replace(qwen2.architecture(config), experts=experts)


def table(arch: Architecture) -> Mapping[str, Row]:
    assert arch.experts is not None
    return {**qwen2.table(arch), **expert_rows(arch.experts, ExpertNames(shared="shared_expert"))}
