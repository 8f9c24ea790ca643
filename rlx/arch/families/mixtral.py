"""Mixtral 8x7B and 8x22B: Llama's attention, every layer a mixture of experts."""

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
from rlx.arch.families.experts import ROUTING_FIELDS, ExpertNames, expert_rows
from rlx.arch.fields import words
from rlx.arch.weights import Row

FIELDS = ROUTING_FIELDS | words("num_local_experts router_jitter_noise sliding_window")
_NAMES = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def architecture(config: ConfigJson) -> Architecture:
    refuse(config, "router_jitter_noise", 0, 0.0, None)
    fields = common_fields(config)
    experts = Experts(
        num_experts=int(require(config, "num_local_experts")),
        top_k=int(require(config, "num_experts_per_tok")),
        hidden_size=fields["ffn_hidden_size"],
        layers=(True,) * fields["num_layers"],
        normalise=True,
    )
    window = config.get("sliding_window")
    return Architecture(**fields, experts=experts, window=None if window is None else int(window))


def table(arch: Architecture) -> Mapping[str, Row]:
    assert arch.experts is not None
    return {**llama.table(arch), **expert_rows(arch.experts, _NAMES)}
