"""DeepSeek-V3 and R1: latent attention, sigmoid routing with a correction bias, groups rated by their best two experts.

The layer that predicts a second token (``num_nextn_predict_layers``) takes no part in log-probs: it is neither read nor
written.
"""

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

FIELDS = latent.LATENT_FIELDS | words("num_nextn_predict_layers")
table = latent.table
# transformers' own, where config.json says nothing
_DEFAULTS = {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "norm_topk_prob": True}


def architecture(config: ConfigJson) -> Architecture:
    config = {**_DEFAULTS, **config}
    refuse(config, "scoring_func", "sigmoid", None)
    refuse(config, "topk_method", "noaux_tc", None)
    experts = Experts(
        num_experts=num_experts(config),
        top_k=int(require(config, "num_experts_per_tok")),
        hidden_size=int(require(config, "moe_intermediate_size")),
        layers=replaced_layers(config),
        score="sigmoid",
        normalise=bool(config["norm_topk_prob"]),
        scale=float(config["routed_scaling_factor"]),
        num_groups=int(config["n_group"] or 1),
        top_groups=int(config["topk_group"] or 1),
        group_rating=2,
        score_bias=True,
        shared_hidden_size=shared_size(config),
    )
    return Architecture(**latent.latent_fields(config), experts=experts)
