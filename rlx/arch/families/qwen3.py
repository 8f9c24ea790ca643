"""Qwen3, dense: Llama's rows and norms on queries and keys, head by head."""

from __future__ import annotations

from rlx.arch.architecture import Architecture, common_fields
from rlx.arch.families import llama, qwen2
from rlx.arch.family import Family
from rlx.arch.fields import ConfigJson, decoder, flag, listed, whole

OWN = {"head_dim": whole(128), "attention_bias": flag(False)}
FIELDS = decoder({**qwen2.QWEN, **OWN, "layer_types": listed(str)}, **qwen2.SIZES)


def architecture(config: ConfigJson) -> Architecture:
    bias = config["attention_bias"]
    fields = common_fields(config) | qwen2.windows(config)
    return Architecture(**fields, qk_norm=True, qkv_bias=bias, projection_bias=bias)


FAMILY = Family(fields=FIELDS, architecture=architecture, table=llama.table)
