"""config.json of vision-language models, in both spellings: every field is what it is to transformers, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from rlx.arch.architecture import Architecture
from rlx.arch.families import qwen2_5_vl, qwen2_vl, qwen_vl
from rlx.arch.families.registry import architecture_of
from rlx.arch.sizes import expected_shapes, sizes_of
from rlx.data.tokenizer import end_ids

# As published: the text model's fields at the top.
_TEXT: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
_PATCHES = {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2, "in_chans": 3}
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": _TEXT
    | {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            **_PATCHES,
        },
    },
    "qwen2_vl": _TEXT
    | {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584, **_PATCHES},
    },
}
TOWERS = {"qwen2_5_vl": qwen2_5_vl._TOWER, "qwen2_vl": qwen2_vl._TOWER}
# Nothing here is a default.
SMALL_TEXT: dict[str, Any] = {
    "vocab_size": 151700,
    "hidden_size": 3584,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 28,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4000,
    "rms_norm_eps": 2e-6,
    "rope_theta": 77_000.0,
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 3,
}
SMALL_TOWER: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 9,
        "hidden_size": 64,
        "intermediate_size": 90,
        "num_heads": 4,
        "hidden_act": "gelu",
        "window_size": 56,
        "fullatt_block_indexes": [1, 7, 40],
        "patch_size": 10,
        "temporal_patch_size": 1,
        "spatial_merge_size": 1,
    },
    "qwen2_vl": {
        "depth": 9,
        "embed_dim": 64,
        "mlp_ratio": 3,
        "num_heads": 4,
        "hidden_act": "gelu",
        "patch_size": 10,
        "temporal_patch_size": 1,
        "spatial_merge_size": 1,
    },
}
FAMILIES = sorted(PUBLISHED)


def small(family: str) -> dict[str, Any]:
    ids = {"image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 9, "vision_end_token_id": 10}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [20, 24, 20]}}
    return {"model_type": family, **SMALL_TEXT, **ids, **rope, "tie_word_embeddings": True, "vision_config": SMALL_TOWER[family]}


def as_transformers_writes_it(config: dict[str, Any]) -> dict[str, Any]:
    written: dict[str, Any] = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    return written


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_configuration_in_both_spellings(family: str) -> None:
    arch = architecture_of(PUBLISHED[family])
    assert arch.vision is not None
    assert (arch.rotary_axes.count(0), arch.rotary_axes.count(1), arch.rotary_axes.count(2)) == (16, 24, 24)
    assert arch.rotary_axes == tuple(sorted(arch.rotary_axes)) and arch.qkv_bias and arch.window is None
    assert (arch.vision.patch_size, arch.vision.merged_size) == (1176, 5120)
    assert arch.vision.mlp_size == (3420 if family == "qwen2_5_vl" else 5120)
    written = as_transformers_writes_it(PUBLISHED[family])
    assert "text_config" in written and "hidden_size" not in written
    assert architecture_of(written) == arch
    both = written | {name: 1 for name in SMALL_TEXT} | {"torch_dtype": "float32", "rope_scaling": None}
    assert architecture_of(both) == arch, "text_config says everything about the text model"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_small_one_in_both_spellings(family: str) -> None:
    arch = architecture_of(small(family))
    assert arch == architecture_of(as_transformers_writes_it(small(family)))
    assert arch.tied_embeddings and arch.windowed_layers == (False, False, False, True, True)
    assert arch.vision is not None and (arch.vision.image_token, arch.vision.end_token) == (7, 10)
    assert arch.vision.full_blocks == ((1, 7) if family == "qwen2_5_vl" else ())


LEFT_OUT = [name for name in qwen_vl.FIELDS if name not in ("model_type", "rope_scaling")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_is_left_out_takes_transformers_default(family: str) -> None:
    for name in LEFT_OUT:
        config = {key: value for key, value in small(family).items() if key != name}
        if name == "vision_config":
            config["hidden_size"] = 3584
        assert read(config) == read(as_transformers_writes_it(config)), name
    for name in {**qwen_vl._TOWER, **TOWERS[family]}:
        tower = {key: value for key, value in SMALL_TOWER[family].items() if key != name}
        config = small(family) | {"vision_config": tower}
        assert read(config) == read(as_transformers_writes_it(config)), name


def read(config: dict[str, Any]) -> Architecture | str:
    """The architecture, or why there is none."""
    try:
        return architecture_of(config)
    except ValueError as error:
        return str(error)


ODD: tuple[Any, ...] = (None, "x", "4", [], {}, 1.5, True, -1, 0, [None], {"rope_type": None}, float("inf"))


@pytest.mark.parametrize("spelling", ["flat", "nested"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_in_any_field_is_taken_or_refused_by_name(family: str, spelling: str) -> None:
    whole = PUBLISHED[family] if spelling == "flat" else as_transformers_writes_it(PUBLISHED[family])
    changed = [(name, {**whole, name: odd}) for name in whole for odd in ODD]
    inner = ("vision_config", "rope_scaling") if spelling == "flat" else ("vision_config", "text_config")
    changed += [(name, {**whole, at: {**whole[at], name: odd}}) for at in inner for name in whole[at] for odd in ODD]
    for name, config in changed:
        found = read(config)
        named: tuple[str, ...] = ("mrope_section",) if name in ("rope_scaling", "rope_parameters", "text_config") else ()
        named += ("rope type",) if name in ("type", "rope_type") else ()
        named += ("hidden_size",) if name == "text_config" else ()
        assert not isinstance(found, str) or ("config.json" in found and any(word in found for word in (name, *named))), (
            name,
            found,
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": None}, "lacks mrope_section"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}}, "sum is not half of heads of 128"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, "rope type 'yarn'"),
        ({"head_dim": 64}, "head_dim=64"),
        ({"image_token_id": 152064}, "image_token_id=152064, outside vocab_size"),
        ({"text_config": 3}, "text_config=3"),
        ({"audio_config": {}, "rope_axes": 3}, "rope_axes"),
        ({"vision_config": {"in_chans": 4}}, "vision_config has in_chans=4"),
        ({"vision_config": {"hidden_size": 1280, "spatial_patch_size": 16}}, "spatial_patch_size=16"),
        ({"vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}}, "hidden_size is 3584"),
        ({"vision_config": {"hidden_size": 1282}}, "width of 1282"),
        ({"vision_config": {"hidden_size": 1280, "window_size": 20}}, "window_size=20, less than the 28 pixels"),
        ({"vision_config": {"hidden_size": 1280, "deepstack_visual_indexes": [5]}}, "vision_config has deepstack_visual_indexes"),
    ],
)
def test_what_is_not_built_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        architecture_of(PUBLISHED["qwen2_5_vl"] | change)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_every_tensor_that_transformers_has(family: str) -> None:
    config = as_transformers_writes_it(small(family) | {"tie_word_embeddings": False})
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family].from_dict(dict(config)))
    names = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tuple(parameter.shape)
        for name, parameter in theirs.named_parameters()
    }
    arch = architecture_of(config)
    assert expected_shapes(arch) == names
    assert sizes_of(arch).total == sum(parameter.numel() for parameter in theirs.parameters())
    assert sizes_of(arch).tower == sum(parameter.numel() for parameter in theirs.model.visual.parameters())


def test_what_ends_an_answer_stands_in_either_place(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for config in (PUBLISHED["qwen2_5_vl"], as_transformers_writes_it(PUBLISHED["qwen2_5_vl"])):
        file.write_text(json.dumps(config))
        assert end_ids(str(tmp_path)) == [151645]
    file.write_text(json.dumps({"text_config": {"vocab_size": 5, "eos_token_id": 7}}))
    with pytest.raises(ValueError, match=r"eos_token_id=7, which is outside its vocabulary of 5"):
        end_ids(str(tmp_path))
