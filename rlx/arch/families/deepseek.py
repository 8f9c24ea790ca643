"""DeepSeek-MoE 16B (``deepseek``): Llama's attention, dense first layers, experts and shared experts."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.arch.architecture import Architecture, Experts, common_fields
from rlx.arch.families import llama
from rlx.arch.families.experts import ROUTING_NAMES, ExpertNames, expert_rows
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, Fields, decoder, flag, refuse, require, text, whole, words
from rlx.arch.weights import Row

# What the generations of DeepSeek share, with the defaults of the first one's own code: transformers has no class for it.
DEEPSEEK: Fields = {
    "n_routed_experts": whole(None, alias="num_local_experts"),
    "num_experts_per_tok": whole(None),
    "moe_intermediate_size": whole(1407),
    "n_shared_experts": whole(None, minimum=0),
    "first_k_dense_replace": whole(0, minimum=0, null=True),
    "moe_layer_freq": whole(1, null=True),
    "norm_topk_prob": flag(False, null=True),
    "scoring_func": text(None),
    "attention_bias": flag(False),
    "pretraining_tp": whole(1, null=True),
}
IGNORED = ROUTING_NAMES | words("ep_size")
FIELDS = decoder({**DEEPSEEK, "mlp_bias": flag(False)}, vocab_size=102400, num_hidden_layers=30, num_key_value_heads=32)


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "attention_bias", False)
    refuse(config, "mlp_bias", False)
    refuse(config, "scoring_func", "softmax", None)
    refuse(config, "pretraining_tp", 1, None)
    experts = Experts(
        num_experts=require(config, "n_routed_experts"),
        top_k=require(config, "num_experts_per_tok"),
        hidden_size=config["moe_intermediate_size"],
        layers=replaced_layers(config),
        normalise=bool(config["norm_topk_prob"]),
        shared_hidden_size=shared_size(config),
    )
    return Architecture(**common_fields(config), experts=experts)


def table(arch: Architecture) -> Mapping[str, Row]:
    assert arch.experts is not None
    return {**llama.table(arch), **expert_rows(arch.experts, ExpertNames())}


def shared_size(config: ConfigJson) -> int:
    """Shared experts stand side by side in one MLP."""
    return int((config["n_shared_experts"] or 0) * config["moe_intermediate_size"])


def replaced_layers(config: ConfigJson) -> tuple[bool, ...]:
    """Layers with experts as DeepSeek says it: every ``moe_layer_freq``-th one from ``first_k_dense_replace`` on."""
    first, every = config["first_k_dense_replace"] or 0, config["moe_layer_freq"] or 1
    return tuple(layer >= first and layer % every == 0 for layer in range(config["num_hidden_layers"]))


FAMILY = Family(
    fields=FIELDS,
    architecture=architecture,
    table=table,
    ignored=IGNORED,
    without_fp8="SGLang packs its experts without their scales",
)
