"""Qwen2-VL (Wang et al. 2024): Qwen2's text model, and a tower that sees the whole image in every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlx.arch.architecture import Architecture
from rlx.arch.families import llama, qwen_vl
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, Fields, text, whole
from rlx.arch.weights import Row

_TOWER: Fields = {
    "embed_dim": whole(1280),
    "hidden_size": whole(3584),
    "hidden_act": text("quick_gelu"),
    "mlp_ratio": whole(4),
}


def architecture(config: ConfigJson) -> Architecture:
    return qwen_vl.architecture(config, _tower, _TOWER)


def _tower(config: ConfigJson) -> Mapping[str, Any]:
    width = config["embed_dim"]
    return {"hidden_size": width, "mlp_size": width * config["mlp_ratio"], "out_size": config["hidden_size"]}


def table(arch: Architecture) -> Mapping[str, Row]:
    mlp = {
        "mlp.fc1.weight": lambda vision: (vision.mlp_size, vision.hidden_size),
        "mlp.fc1.bias": lambda vision: (vision.mlp_size,),
        "mlp.fc2.weight": lambda vision: (vision.hidden_size, vision.mlp_size),
        "mlp.fc2.bias": lambda vision: (vision.hidden_size,),
    }
    return {**llama.table(arch), **qwen_vl.tower_rows(mlp, ("weight", "bias"))}


FAMILY = Family(fields=qwen_vl.FIELDS, architecture=architecture, table=table, ignored=qwen_vl.IGNORED, spelling=qwen_vl.flat)
