"""Mixtral 8x7B and 8x22B: Llama's attention, every layer a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping

from rlx.arch.architecture import Architecture, Experts, common_fields
from rlx.arch.families import llama
from rlx.arch.families.experts import ROUTING_NAMES, ExpertNames, expert_rows
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, decoder, number, refuse, whole
from rlx.arch.weights import Row

FIELDS = decoder(
    {
        "num_key_value_heads": whole(8),
        "num_local_experts": whole(8, alias="num_experts"),
        "num_experts_per_tok": whole(2),
        "router_jitter_noise": number(0.0),
        "sliding_window": whole(None),
    },
    intermediate_size=14336,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=1_000_000.0,
)
_NAMES = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "router_jitter_noise", 0)
    fields = common_fields(config)
    experts = Experts(
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        hidden_size=fields["ffn_hidden_size"],
        layers=(True,) * fields["num_layers"],
        normalise=True,
    )
    return Architecture(**fields, experts=experts, window=config["sliding_window"])


def table(arch: Architecture) -> Mapping[str, Row]:
    assert arch.experts is not None
    return {**llama.table(arch), **expert_rows(arch.experts, _NAMES)}


FAMILY = Family(fields=FIELDS, architecture=architecture, table=table, ignored=ROUTING_NAMES)
