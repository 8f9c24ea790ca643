"""DeepSeek-V3 and R1: latent attention, sigmoid routing with a correction bias, groups rated by their best two experts.

The layer that predicts a second token (``num_nextn_predict_layers``) takes no part in log-probs: it is neither read nor
written.
"""

from __future__ import annotations

from rlx.arch.architecture import Architecture, Experts
from rlx.arch.families import latent
from rlx.arch.families.deepseek import IGNORED, replaced_layers, shared_size
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, decoder, flag, number, refuse, require, text, whole

FIELDS = decoder(
    {
        **latent.LATENT,
        "n_routed_experts": whole(256, alias="num_local_experts"),
        "num_experts_per_tok": whole(8, null=True),
        "moe_intermediate_size": whole(2048),
        "n_shared_experts": whole(1, minimum=0),
        "first_k_dense_replace": whole(3, minimum=0, null=True),
        "n_group": whole(8, null=True),
        "topk_group": whole(4, null=True),
        "topk_method": text(None),
        "routed_scaling_factor": number(2.5),
        "norm_topk_prob": flag(True, null=True),
    },
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    max_position_embeddings=4096,
)


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "scoring_func", "sigmoid", None)
    refuse(config, "topk_method", "noaux_tc", None)
    experts = Experts(
        num_experts=config["n_routed_experts"],
        top_k=require(config, "num_experts_per_tok"),
        hidden_size=config["moe_intermediate_size"],
        layers=replaced_layers(config),
        score="sigmoid",
        normalise=bool(config["norm_topk_prob"]),
        scale=float(config["routed_scaling_factor"]),
        num_groups=config["n_group"] or 1,
        top_groups=config["topk_group"] or 1,
        group_rating=2,
        score_bias=True,
        shared_hidden_size=shared_size(config),
    )
    return Architecture(**latent.latent_fields(config), experts=experts)


FAMILY = Family(
    fields=FIELDS,
    architecture=architecture,
    table=latent.table,
    ignored=IGNORED | {"num_nextn_predict_layers"},
    without_fp8=latent.WITHOUT_FP8,
)
