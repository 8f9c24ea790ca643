"""Fields of config.json that are left out, or null, mean what they mean to transformers: swept over every family and field."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import FAMILIES, architecture_of

# DeepSeek's first generation has no class in transformers; those with a tower nest their fields (test_vision_config.py).
SWEPT = sorted(FAMILIES.keys() - {"deepseek", "qwen2_vl", "qwen2_5_vl"})
# Nothing here is a default of any family.
SMALL: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 128,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4000,
    "rms_norm_eps": 2e-6,
    "rope_theta": 77_000.0,
    "tie_word_embeddings": True,
    "head_dim": 10,
}
EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 12, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": WINDOWS,
    "qwen3": {**WINDOWS, "attention_bias": True},
    "qwen2_moe": {**WINDOWS, **EXPERTS, "num_experts": 9, "shared_expert_intermediate_size": 20, "norm_topk_prob": True},
    "qwen3_moe": {**WINDOWS, **EXPERTS, "num_experts": 9, "norm_topk_prob": True, "attention_bias": True},
    "mixtral": {"num_local_experts": 9, "num_experts_per_tok": 3, "sliding_window": 7},
    "gemma2": {
        "tie_word_embeddings": False,
        "query_pre_attn_scalar": 30,
        "sliding_window": 7,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "attention_bias": True,
    },
    "phi3": {"original_max_position_embeddings": 3000, "sliding_window": 7},
    "deepseek_v2": {"rms_norm_eps": 1e-6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "q_lora_rank": 20},
    "deepseek_v3": {"rms_norm_eps": 1e-6, "n_routed_experts": 96, "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
}
CASES = [(family, field) for family in SWEPT for field in FAMILIES[family].fields if field != "model_type"]


def spelt_out(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as transformers takes it: every field of the family with its value."""
    model_type = config["model_type"]
    theirs = CONFIG_MAPPING[model_type].from_dict(dict(config))
    return {name: getattr(theirs, name) for name in FAMILIES[model_type].fields if hasattr(theirs, name)}


def base_of(family: str) -> dict[str, Any]:
    return {"model_type": family, **SMALL, **OWN[family]}


def read_as_transformers_does(config: dict[str, Any]) -> Architecture:
    return architecture_of(spelt_out(config))


@pytest.mark.parametrize("family", SWEPT)
def test_a_configuration_of_defaults_alone(family: str) -> None:
    config = {"model_type": family, **({"num_experts_per_tok": 6} if family == "deepseek_v2" else {})}
    assert architecture_of(config) == read_as_transformers_does(config)


@pytest.mark.parametrize(("family", "field"), CASES)
def test_a_field_that_is_left_out_takes_transformers_default(family: str, field: str) -> None:
    config = base_of(family)
    config.pop(field, None)
    if (family, field) == ("deepseek_v2", "num_experts_per_tok"):
        with pytest.raises(ValueError, match="num_experts_per_tok"):
            architecture_of(config)
        return
    assert architecture_of(config) == read_as_transformers_does(config)


@pytest.mark.parametrize(("family", "field"), CASES)
def test_null_is_what_it_is_to_transformers_or_refused_by_name(family: str, field: str) -> None:
    config = {**base_of(family), field: None}
    try:
        meant = read_as_transformers_does(config)
    except Exception:  # whatever transformers, or our reading of what it made of it, objects to
        meant = None
    try:
        found = architecture_of(config)
    except ValueError as error:
        assert meant is None and field in str(error)
    else:
        left_out = {name: value for name, value in config.items() if name != field}
        assert found == (architecture_of(left_out) if meant is None else meant)


@pytest.mark.parametrize("family", SWEPT)
@pytest.mark.parametrize("wrong", ["x", True, -1, 2.5, [1], {"a": 1}])
def test_values_of_another_kind_are_refused_by_name(family: str, wrong: object) -> None:
    for field in ("vocab_size", "num_hidden_layers", "rms_norm_eps", "rope_scaling", "tie_word_embeddings"):
        if (field, wrong) in (("rms_norm_eps", 2.5), ("rms_norm_eps", -1), ("tie_word_embeddings", True)) or (
            field == "rope_scaling" and isinstance(wrong, dict)
        ):
            continue
        with pytest.raises(ValueError, match=field):
            architecture_of({**base_of(family), field: wrong})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 6}, "64 attention heads, no multiple of 6 key-value heads"),
        ({"head_dim": 9}, "heads of 9"),
        ({"head_dim": None, "hidden_size": 50}, "hidden_size=50, no multiple of num_attention_heads=64"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor='two'"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "'factor'"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_numbers_that_no_model_has_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        architecture_of(base_of("llama") | change)


@pytest.mark.parametrize(
    ("family", "own"), [("qwen3_moe", "num_experts"), ("mixtral", "num_local_experts"), ("deepseek_v3", "n_routed_experts")]
)
def test_experts_are_counted_under_either_name(family: str, own: str) -> None:
    config = {name: value for name, value in base_of(family).items() if name != own}
    other = "num_experts" if family == "mixtral" else "num_local_experts"
    found = architecture_of({**config, other: 24})
    assert found.experts is not None and found.experts.num_experts == 24
    assert found == read_as_transformers_does({**config, other: 24})
