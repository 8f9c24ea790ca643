"""Mixture of experts in Megatron's terms: configuration fields and layer specifications."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec

from rlx.arch.architecture import Architecture, Experts
from rlx.models.routing import RoutedLayer, Router
from rlx.types.layout import ParallelDims


def expert_fields(arch: Architecture, dims: ParallelDims, grouped: bool) -> dict[str, Any]:
    """Fields of Megatron's configuration; none for a dense model. ``grouped`` runs a rank's experts as one product."""
    experts = arch.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.hidden_size,
        # A list also tells Megatron's checkpoints that layers differ.
        "moe_layer_freq": 1 if all(experts.layers) else [int(sparse) for sparse in experts.layers],
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": experts.shared_hidden_size or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": dims.ep,
        "expert_tensor_parallel_size": dims.expert_tp,
    }


def route(layer: ModuleSpec, experts: Experts, aux_coefficient: float, z_coefficient: float) -> None:
    """Give the specification of a mixture-of-experts layer our router."""
    layer.module = RoutedLayer
    router = partial(Router, experts=experts, aux_coefficient=aux_coefficient, z_coefficient=z_coefficient)
    layer.submodules.mlp = partial(MoELayer, submodules=replace(layer.submodules.mlp.keywords["submodules"], router=router))
