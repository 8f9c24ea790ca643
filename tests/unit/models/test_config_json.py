"""What config.json says is honoured or refused by name; the numbers are those of transformers' own classes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import FAMILIES, read_architecture
from rlx.arch.longrope import LongRope
from rlx.models.frequencies import inverse_frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "vocab_size": 131,
}
QWEN2 = {name: value for name, value in LLAMA.items() if name != "pretraining_tp"} | {
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 7,
    "max_window_layers": 3,
}
QWEN3 = QWEN2 | {"model_type": "qwen3"}
# As the first releases wrote it: no head size tied to the hidden one, no layer types, no tie_word_embeddings.
GEMMA2 = {name: value for name, value in LLAMA.items() if name not in ("pretraining_tp", "tie_word_embeddings")} | {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 20,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 144,
    "sliding_window": 7,
    "sliding_window_size": 7,
    "rope_theta": 10000.0,
}
PHI3 = {name: value for name, value in LLAMA.items() if name not in ("pretraining_tp", "rms_norm_eps")} | {
    "model_type": "phi3",
    "_name_or_path": "Phi-3-mini-128k-instruct",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3 + [1.5] * 3, "long_factor": [1.1, 2.0, 3.0, 8.0, 20.0, 64.0]},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path, config: dict[str, Any]) -> Architecture:
    return read_architecture(write(folder, config))


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3, GEMMA2, PHI3], ids=lambda config: config["model_type"])
def test_published_configurations_mean_what_transformers_takes_them_for(tmp_path: Path, config: dict[str, Any]) -> None:
    arch = read(tmp_path, config)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert arch.tied_embeddings == theirs.tie_word_embeddings
    assert arch.norm_eps == theirs.rms_norm_eps
    assert arch.rope_theta == theirs.rope_parameters["rope_theta"]
    assert arch.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    layer_types = getattr(theirs, "layer_types", None) or ["sliding_attention" if arch.window else "full_attention"] * 4
    assert (arch.windowed_layers or (False,) * 4) == tuple(kind == "sliding_attention" for kind in layer_types)
    if arch.window is not None:
        assert arch.window == theirs.sliding_window
    if config["model_type"] == "gemma2":
        assert arch.softmax_scale() == pytest.approx(144**-0.5)
        assert (arch.attention_softcap, arch.final_softcap) == (50.0, 30.0)
        assert (arch.activation, arch.embedding_scale) == ("gelu_tanh", math.sqrt(48))


def test_longrope_is_that_of_transformers(tmp_path: Path) -> None:
    arch = read(tmp_path, PHI3 | {"rope_scaling": PHI3["rope_scaling"] | {"type": "su"}})
    assert arch == read(tmp_path, PHI3), "its name in the first release"
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(arch.rope, LongRope) and arch.rope.original_max_positions == 4096
    for factors, length in ((arch.rope.short_factors, 4096), (arch.rope.long_factors, 4097)):
        expected, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, torch.device("cpu"), seq_len=length)
        torch.testing.assert_close(inverse_frequencies(arch) / torch.tensor(factors), expected, rtol=1e-6, atol=0)
        assert arch.rope.attention_factor == pytest.approx(attention_factor)
    assert arch.softmax_scale() == pytest.approx(12**-0.5 * attention_factor**2)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "'llama3'"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.7}}, ["mscale", "'linear'"]),
        (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        (LLAMA, {"hidden_act": "relu"}, ["hidden_act='relu'", "'silu'"]),
        (LLAMA, {"attention_dropout": 0.1}, ["attention_dropout=0.1"]),
        (LLAMA, {"pretraining_tp": 2}, ["pretraining_tp=2"]),
        (LLAMA, {"quantization_config": {"bits": 4}}, ["quantization_config", "'llama'", "null"]),
        (LLAMA, {"sliding_window": 4096}, ["sliding_window", "'llama'"]),
        (LLAMA, {"logit_scale": 0.5, "mup_base": 3}, ["logit_scale, mup_base"]),
        (LLAMA, {"vocab_size": None}, ["vocab_size"]),
        (LLAMA, {"rms_norm_eps": -1}, ["rms_norm_eps=-1", "above 0"]),
        (LLAMA, {"rope_theta": 0}, ["rope_theta=0", "above 0"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.0}}, ["factor=0.0", "above 0"]),
        (GEMMA2, {"attn_logit_softcapping": 0.0}, ["attn_logit_softcapping=0.0", "above 0"]),
        (LLAMA, {"model_type": "mpt"}, ["'mpt'", "gemma2", "qwen3"]),
        (QWEN2, {"layer_types": ["full_attention"] * 3}, ["3 layer_types", "num_hidden_layers=4"]),
        (QWEN2, {"layer_types": ["chunked_attention"] * 4}, ["chunked_attention"]),
        (QWEN2, {"layer_types": ["sliding_attention"] * 4}, ["sliding_window"]),
        (GEMMA2, {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        (GEMMA2, {"sliding_window_size": 8}, ["sliding_window_size=8", "7"]),
        (PHI3, {"resid_pdrop": 0.1}, ["resid_pdrop=0.1"]),
        (PHI3, {"rope_scaling": PHI3["rope_scaling"] | {"short_mscale": 1.2}}, ["short_mscale"]),
        (PHI3, {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6}}, ["long_factor"]),
        (PHI3, {"rope_scaling": PHI3["rope_scaling"] | {"long_factor": [1.0] * 5}}, ["long_factor", "5", "6"]),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, config | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("eos_token_id", 131, "outside its vocabulary of 131"),
        ("eos_token_id", [2, 999], "eos_token_id=999, which is outside"),
        ("eos_token_id", -1, "outside its vocabulary"),
        ("eos_token_id", "</s>", "expected a token id or a list"),
        ("eos_token_id", True, "expected a token id or a list"),
        ("bos_token_id", 131, "bos_token_id=131, which is outside"),
        ("pad_token_id", 131, "pad_token_id=131, which is outside"),
        ("pad_token_id", -2, "pad_token_id=-2, which is outside"),
        ("torch_dtype", "int8", "torch_dtype='int8'; expected one of auto, bfloat16"),
        ("dtype", 4, "dtype=4; expected one of"),
    ],
)
def test_what_names_tokens_and_types_must_be_such(tmp_path: Path, field: str, value: object, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {field: value}))
    with pytest.raises(ValueError, match=f"{tmp_path}: config.json has {field}") as caught:
        read_architecture(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "field", [{"pad_token_id": -1}, {"pad_token_id": None}, {"eos_token_id": [1, 130]}, {"torch_dtype": None}]
)
@pytest.mark.parametrize("dtype", ["torch.bfloat16", "float32", "auto"])
def test_none_and_lists_and_torchs_names_are_taken(tmp_path: Path, field: dict[str, object], dtype: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"dtype": dtype} | field))
    read_architecture(tmp_path)


def test_unknown_fields_that_are_off_are_let_through(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"mystery": None, "use_mystery": False, "mystery_rate": 0.0}) == read(tmp_path, LLAMA)


def test_windows_of_qwen2_start_where_they_should(tmp_path: Path) -> None:
    arch = read(tmp_path, QWEN2 | {"use_sliding_window": True})
    assert (arch.window, arch.windowed_layers) == (7, (False, False, False, True))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_family_costs_less_than_a_hundred_lines(model_type: str) -> None:
    module = FAMILIES[model_type].architecture.__module__
    file = Path(__file__).parents[3] / (module.replace(".", "/") + ".py")
    assert len(file.read_text().splitlines()) < 100


ODD_VALUES: tuple[Any, ...] = (None, "x", "4", [], {}, 1.5, True, -1, 0, [None], {"rope_type": None}, float("inf"))
SHAPES = (Path(__file__).parents[3] / "configs" / "architectures").glob("*/config.json")
ONE_A_FAMILY = {json.loads(file.read_text())["model_type"]: file for file in sorted(SHAPES)}


@pytest.mark.parametrize("file", ONE_A_FAMILY.values(), ids=ONE_A_FAMILY)
def test_any_value_in_any_field_is_taken_or_refused_by_name(tmp_path: Path, file: Path) -> None:
    whole = json.loads(file.read_text())
    changed = [(name, {**whole, name: odd}) for name in whole for odd in ODD_VALUES]
    for name in ("rope_scaling", "rope_parameters"):
        inner = whole.get(name) or {}
        changed += [(key, {**whole, name: {**inner, key: odd}}) for key in inner for odd in ODD_VALUES]
    for name, config in changed:
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            read_architecture(tmp_path)
        except ValueError as error:
            assert name in str(error) and "config.json" in str(error)
