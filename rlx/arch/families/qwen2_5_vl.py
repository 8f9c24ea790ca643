"""Qwen2.5-VL (Bai et al. 2025): Qwen2's text model, and a tower with windows in most of its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlx.arch.architecture import Architecture
from rlx.arch.families import llama, qwen_vl
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, Field, Fields, listed, text, whole
from rlx.arch.weights import Row

_TOWER: Fields = {
    "hidden_size": whole(3584),
    "intermediate_size": whole(3420),
    "hidden_act": text("silu"),
    "out_hidden_size": whole(3584),
    "window_size": whole(112),
    "fullatt_block_indexes": listed(int, [7, 15, 23, 31]),
    "tokens_per_second": Field(default=4, kind="a number", fits=lambda value: True, null=True),  # of videos
}


def architecture(config: ConfigJson) -> Architecture:
    return qwen_vl.architecture(config, _tower, _TOWER)


def _tower(config: ConfigJson) -> Mapping[str, Any]:
    window, factor = config["window_size"], config["patch_size"] * config["spatial_merge_size"]
    if window < factor:
        raise ValueError(f"config.json has window_size={window}, less than the {factor} pixels of one token")
    return {
        "hidden_size": config["hidden_size"],
        "mlp_size": config["intermediate_size"],
        "out_size": config["out_hidden_size"],
        "window": window,
        "full_blocks": tuple(sorted(set(config["fullatt_block_indexes"]) & set(range(config["depth"])))),
    }


def table(arch: Architecture) -> Mapping[str, Row]:
    mlp = {
        **{f"mlp.{part}_proj.weight": lambda vision: (vision.mlp_size, vision.hidden_size) for part in ("gate", "up")},
        **{f"mlp.{part}_proj.bias": lambda vision: (vision.mlp_size,) for part in ("gate", "up")},
        "mlp.down_proj.weight": lambda vision: (vision.hidden_size, vision.mlp_size),
        "mlp.down_proj.bias": lambda vision: (vision.hidden_size,),
    }
    return {**llama.table(arch), **qwen_vl.tower_rows(mlp, ("weight",))}


FAMILY = Family(fields=qwen_vl.FIELDS, architecture=architecture, table=table, ignored=qwen_vl.IGNORED, spelling=qwen_vl.flat)
