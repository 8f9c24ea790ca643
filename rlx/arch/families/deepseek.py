"""DeepSeek-MoE 16B (``deepseek``): Llama's attention, dense first layers, experts and shared experts."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.arch.architecture import (
    Architecture,
    ConfigJson,
    Experts,
    common_fields,
    refuse,
    require,
)
from rlx.arch.families import llama
from rlx.arch.families.experts import (
    ROUTING_FIELDS,
    ExpertNames,
    expert_rows,
    num_experts,
)
from rlx.arch.fields import words
from rlx.arch.weights import Row

DEEPSEEK_FIELDS = ROUTING_FIELDS | words(
    """
    n_routed_experts num_local_experts moe_intermediate_size
    n_shared_experts first_k_dense_replace moe_layer_freq scoring_func norm_topk_prob
    attention_bias pretraining_tp ep_size
    """
)
FIELDS = DEEPSEEK_FIELDS | words("mlp_bias")


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "attention_bias", False, None)
    refuse(config, "mlp_bias", False, None)
    refuse(config, "scoring_func", "softmax", None)
    refuse(config, "pretraining_tp", 1, None)
    experts = Experts(
        num_experts=num_experts(config),
        top_k=int(require(config, "num_experts_per_tok")),
        hidden_size=int(require(config, "moe_intermediate_size")),
        layers=replaced_layers(config),
        normalise=bool(config.get("norm_topk_prob", False)),
        shared_hidden_size=shared_size(config),
    )
    return Architecture(**common_fields(config), experts=experts)


def table(arch: Architecture) -> Mapping[str, Row]:
    assert arch.experts is not None
    return {**llama.table(arch), **expert_rows(arch.experts, ExpertNames())}


def shared_size(config: ConfigJson) -> int:
    """Shared experts stand side by side in one MLP."""
    return int(config.get("n_shared_experts") or 0) * int(require(config, "moe_intermediate_size"))


def replaced_layers(config: ConfigJson) -> tuple[bool, ...]:
    """Layers with experts as DeepSeek says it: every ``moe_layer_freq``-th one from ``first_k_dense_replace`` on."""
    first, every = int(config.get("first_k_dense_replace") or 0), int(config.get("moe_layer_freq") or 1)
    return tuple(layer >= first and layer % every == 0 for layer in range(int(require(config, "num_hidden_layers"))))
