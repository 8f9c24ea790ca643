"""DeepSeek-V2 and V2-Lite: latent attention, softmax routing, groups rated by their best expert."""

from __future__ import annotations

from rlx.arch.architecture import (
    Architecture,
    ConfigJson,
    Experts,
    refuse,
    require,
)
from rlx.arch.families import latent
from rlx.arch.families.deepseek import replaced_layers, shared_size
from rlx.arch.families.experts import num_experts
from rlx.arch.fields import words

FIELDS = latent.LATENT_FIELDS | words("mlp_bias")
table = latent.table


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "mlp_bias", False, None)
    refuse(config, "scoring_func", "softmax", None)
    refuse(config, "topk_method", "greedy", "group_limited_greedy", None)
    # transformers ignores it, DeepSeek's own code renormalises and then leaves out the scaling factor.
    refuse(config, "norm_topk_prob", False, None)
    grouped = config.get("topk_method") == "group_limited_greedy"
    experts = Experts(
        num_experts=num_experts(config),
        top_k=int(require(config, "num_experts_per_tok")),
        hidden_size=int(require(config, "moe_intermediate_size")),
        layers=replaced_layers(config),
        scale=float(config.get("routed_scaling_factor", 1.0)),
        num_groups=int(require(config, "n_group")) if grouped else 1,
        top_groups=int(require(config, "topk_group")) if grouped else 1,
        shared_hidden_size=shared_size(config),
    )
    return Architecture(**latent.latent_fields(config), experts=experts)
