"""DeepSeek-V2 and V2-Lite: latent attention, softmax routing, groups rated by their best expert."""

from __future__ import annotations

from rlx.arch.architecture import Architecture, Experts
from rlx.arch.families import latent
from rlx.arch.families.deepseek import IGNORED, replaced_layers, shared_size
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, decoder, flag, number, refuse, require, text, whole

FIELDS = decoder(
    {
        **latent.LATENT,
        "n_routed_experts": whole(64, alias="num_local_experts"),
        "n_shared_experts": whole(2, minimum=0),
        "first_k_dense_replace": whole(0, minimum=0),
        "n_group": whole(None),
        "topk_group": whole(None),
        "topk_method": text("greedy", null=True),
        "routed_scaling_factor": number(1.0),
        "mlp_bias": flag(False),
    }
)


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "mlp_bias", False)
    refuse(config, "scoring_func", "softmax", None)
    refuse(config, "topk_method", "greedy", "group_limited_greedy", None)
    # transformers ignores it, DeepSeek's own code renormalises and then leaves out the scaling factor.
    refuse(config, "norm_topk_prob", False, None)
    grouped = config["topk_method"] == "group_limited_greedy"
    experts = Experts(
        num_experts=config["n_routed_experts"],
        top_k=require(config, "num_experts_per_tok"),
        hidden_size=config["moe_intermediate_size"],
        layers=replaced_layers(config),
        scale=float(config["routed_scaling_factor"]),
        num_groups=require(config, "n_group") if grouped else 1,
        top_groups=require(config, "topk_group") if grouped else 1,
        shared_hidden_size=shared_size(config),
    )
    return Architecture(**latent.latent_fields(config), experts=experts)


FAMILY = Family(
    fields=FIELDS,
    architecture=architecture,
    table=latent.table,
    ignored=IGNORED,
    without_fp8=latent.WITHOUT_FP8,
)
