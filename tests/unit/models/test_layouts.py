"""A layout that `layout_problems` lets through can be built and loaded; nothing else in the library refuses it later."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rlx.arch.architecture import Architecture
from rlx.arch.families.experts import layers_of
from rlx.arch.families.registry import architecture_of, weight_table
from rlx.arch.layout import layout_problems
from rlx.arch.weights import Shard
from rlx.models.build import BuildOptions, megatron_config
from rlx.parallel.context import ParallelContext
from rlx.types.layout import ParallelDims

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 10},
    "gemma2": {"head_dim": 6},
    "phi3": {},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "decoder_sparse_step": 2},
    "mixtral": {"num_local_experts": 6},
    "deepseek_v3": {"rms_norm_eps": 1e-6, "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
}


def draw_model(draw: random.Random, family: str) -> Architecture:
    heads = draw.choice([4, 6, 12])
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([size for size in (1, 2, 4, 6) if not heads % size]),
    }
    more = {
        "hidden_size": 8 * heads,
        "intermediate_size": draw.choice([40, 66, 96]),
        "num_hidden_layers": draw.choice([4, 5, 12]),
    }
    return architecture_of({"model_type": family, "vocab_size": 131, **sizes, **more, **FAMILIES[family]})


def draw_dims(draw: random.Random) -> ParallelDims | None:
    names = ("tp", "pp", "vpp", "cp", "ep")
    sizes = {name: draw.choice([1, 1, 2, 3, 4]) for name in names} | {"etp": draw.choice([None, 1, 2])}
    try:
        world = draw.choice([1, 2, 4, 6, 12, 24])
        return ParallelDims(world_size=world, sequence_parallel=cast(int, sizes["tp"]) > 1, **cast(Any, sizes))
    except ValueError:
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_let_through_can_be_built_and_loaded(family: str, seed: int) -> None:
    draw = random.Random(seed)
    tried = 0
    while tried < 12:
        arch, dims = draw_model(draw, family), draw_dims(draw)
        if dims is None or list(layout_problems(arch, dims)):
            continue
        tried += 1
        context = cast(ParallelContext, SimpleNamespace(dims=dims, device=torch.device("cpu")))
        megatron_config(arch, context, BuildOptions())
        for name, row in weight_table(arch).items():
            if not layers_of(name, arch):  # the MLP of a model whose every layer has experts
                continue
            size = dims.expert_tp if "{expert}" in name else dims.tp
            assert all(row.runs(Shard(rank=rank, size=size), arch) for rank in range(size))


def test_what_is_refused_names_its_dimension() -> None:
    arch = architecture_of({"model_type": "qwen2", "num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 96,
                            "intermediate_size": 240, "num_hidden_layers": 4})  # fmt: skip
    for dims, dimension, words in (
        (ParallelDims(world_size=8, tp=8), "tp", "12 attention heads"),
        (ParallelDims(world_size=6, tp=6), "tp", "4 key-value heads"),
        (ParallelDims(world_size=5, pp=5), "pp", "4 layers"),
        (ParallelDims(world_size=2, ep=2), "ep", "dense"),
    ):
        assert (dimension, words) in [(name, words) for name, problem in layout_problems(arch, dims) if words in problem]
