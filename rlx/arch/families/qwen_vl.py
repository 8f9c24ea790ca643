"""What the vision-language models of the Qwen2 lineage share: both spellings of config.json, rotary axes, the tower's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlx.arch.architecture import Architecture, common_fields
from rlx.arch.families import qwen2
from rlx.arch.fields import HARMLESS, ConfigJson, Fields, complete, decoder, listed, nested, refuse, text, whole, words
from rlx.arch.vision import CHANNELS, Vision
from rlx.arch.weights import Copy, Row

_TEXT = decoder(
    {
        **qwen2.QWEN,
        "sliding_window": whole(4096, null=True),
        "max_window_layers": whole(80, minimum=0),
        "layer_types": listed(str),
    },
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1_000_000.0,
)
_OWN: Fields = {
    "vision_config": nested(),
    "image_token_id": whole(151655, minimum=0),
    "video_token_id": whole(151656, minimum=0),
    "vision_start_token_id": whole(151652, minimum=0),
    "vision_end_token_id": whole(151653, minimum=0),
}
FIELDS: Fields = {**_TEXT, **_OWN}
IGNORED = words("text_config vision_token_id")
# What stands at the top for the whole model, whatever text_config repeats of it.
_OF_ALL = {"model_type", "tie_word_embeddings", *_OWN, *IGNORED}
_TOWER: Fields = {
    "model_type": text(""),
    "depth": whole(32),
    "num_heads": whole(16),
    "in_channels": whole(CHANNELS),
    "in_chans": whole(CHANNELS),
    "patch_size": whole(14),
    "spatial_patch_size": whole(None),
    "spatial_merge_size": whole(2),
    "temporal_patch_size": whole(2),
}
_ACTIVATIONS = ("silu", "gelu", "quick_gelu", "gelu_pytorch_tanh")
_BLOCK, _HF_BLOCK = "vision.blocks.{layer}.", "visual.blocks.{layer}."


def flat(config: ConfigJson) -> ConfigJson:
    """The published spelling, with the text model's fields at the top, of the one that transformers 5 writes, with a
    ``text_config``. As in transformers, that says everything about the text model where it is there."""
    inner = config.get("text_config")
    if inner is None:
        return config
    if not isinstance(inner, dict):
        raise ValueError(f"config.json has text_config={inner!r}; expected an object")
    of_text = {name: value for name, value in inner.items() if name not in _OF_ALL | HARMLESS}
    of_all = {name: value for name, value in config.items() if name in _OF_ALL or name not in _TEXT}
    return {**of_all, **of_text}


def architecture(config: ConfigJson, make_tower: Callable[[ConfigJson], Mapping[str, Any]], own: Fields) -> Architecture:
    """``own`` are the tower's fields beside those that every tower has; ``make_tower`` gives its sizes from all of them."""
    section, text_model = _rotary(config)
    fields = common_fields(text_model)
    if fields["head_dim"] * fields["num_heads"] != fields["hidden_size"]:
        raise ValueError(f"config.json has head_dim={fields['head_dim']}; supported: hidden_size / num_attention_heads")
    if 2 * sum(section) != fields["head_dim"]:
        raise ValueError(f"config.json has mrope_section={list(section)}, whose sum is not half of heads of {fields['head_dim']}")
    axes = tuple(axis for axis, count in enumerate(section) for _ in range(count))
    vision = _vision(config, make_tower, own, fields["hidden_size"])
    if not vision.image_token < fields["vocab_size"]:
        raise ValueError(f"config.json has image_token_id={vision.image_token}, outside vocab_size={fields['vocab_size']}")
    return Architecture(**fields, **qwen2.windows(config), qkv_bias=True, rotary_axes=axes, vision=vision)


def _rotary(config: ConfigJson) -> tuple[tuple[int, int, int], ConfigJson]:
    """How many frequencies turn by time, height and width; and the fields without that, as for any text model."""
    name = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    found = dict(config[name] or {})
    section = found.pop("mrope_section", None)
    if section is None:
        raise ValueError("config.json lacks mrope_section in its rope_scaling (or rope_parameters)")
    if not isinstance(section, list) or len(section) != 3 or not all(type(n) is int and n >= 0 for n in section):
        raise ValueError(f"config.json has mrope_section={section!r}; expected three whole numbers")
    if found.get("rope_type", found.get("type")) == "mrope":
        found["rope_type"] = "default"
    return (section[0], section[1], section[2]), {**config, name: found}


def _vision(config: ConfigJson, make_tower: Callable[[ConfigJson], Mapping[str, Any]], own: Fields, text_size: int) -> Vision:
    try:
        tower = complete(config["vision_config"] or {}, {**_TOWER, **own}, ())
        for name in ("in_channels", "in_chans"):
            refuse(tower, name, CHANNELS)
        refuse(tower, "spatial_patch_size", tower["patch_size"], None)
        refuse(tower, "hidden_act", *_ACTIVATIONS)
        sizes = dict(make_tower(tower))
        width, heads, out = sizes["hidden_size"], tower["num_heads"], sizes.pop("out_size")
        if width % (4 * heads):
            raise ValueError(f"config.json has a width of {width}, which num_heads={heads} do not share out in multiples of 4")
        if out != text_size:
            raise ValueError(f"config.json has a projector to {out}, but the text model's hidden_size is {text_size}")
    except ValueError as error:
        raise ValueError(str(error).replace("config.json", "config.json: vision_config", 1)) from error
    return Vision(
        depth=tower["depth"],
        num_heads=heads,
        activation=tower["hidden_act"],
        patch=tower["patch_size"],
        temporal=tower["temporal_patch_size"],
        merge=tower["spatial_merge_size"],
        image_token=config["image_token_id"],
        video_token=config["video_token_id"],
        start_token=config["vision_start_token_id"],
        end_token=config["vision_end_token_id"],
        **sizes,
    )


def tower_rows(block: Mapping[str, Callable[[Vision], tuple[int, ...]]], norms: tuple[str, ...]) -> Mapping[str, Row]:
    """Rows of a tower, which no tensor parallelism splits: what all have, and of each block the shapes ``block`` by name.
    ``norms`` are the parameters that a norm has."""

    def conv(vision: Vision) -> tuple[int, ...]:
        return vision.hidden_size, CHANNELS, vision.temporal, vision.patch, vision.patch

    rows: dict[str, Row] = {"vision.patch_embed.proj.weight": _copy("patch_embed.proj.weight", conv)}
    of_blocks = {
        **{f"norm{number}.{part}": lambda vision: (vision.hidden_size,) for number in (1, 2) for part in norms},
        "attn.qkv.weight": lambda vision: (3 * vision.hidden_size, vision.hidden_size),
        "attn.qkv.bias": lambda vision: (3 * vision.hidden_size,),
        "attn.proj.weight": lambda vision: (vision.hidden_size, vision.hidden_size),
        "attn.proj.bias": lambda vision: (vision.hidden_size,),
        **block,
    }
    rows |= {_BLOCK + name: Copy(_HF_BLOCK + name, _of_vision(shape)) for name, shape in of_blocks.items()}
    rows |= {f"vision.merger.ln_q.{part}": _copy(f"merger.ln_q.{part}", lambda vision: (vision.hidden_size,)) for part in norms}
    rows |= {
        "vision.merger.mlp.0.weight": _copy("merger.mlp.0.weight", lambda vision: (vision.merged_size, vision.merged_size)),
        "vision.merger.mlp.0.bias": _copy("merger.mlp.0.bias", lambda vision: (vision.merged_size,)),
        "vision.merger.mlp.2.weight": Copy("visual.merger.mlp.2.weight", _projection),
        "vision.merger.mlp.2.bias": Copy("visual.merger.mlp.2.bias", lambda arch: (arch.hidden_size,)),
    }
    return rows


def _copy(name: str, shape: Callable[[Vision], tuple[int, ...]]) -> Copy:
    return Copy("visual." + name, _of_vision(shape))


def _of_vision(shape: Callable[[Vision], tuple[int, ...]]) -> Callable[[Architecture], tuple[int, ...]]:
    def of(arch: Architecture) -> tuple[int, ...]:
        assert arch.vision is not None
        return shape(arch.vision)

    return of


def _projection(arch: Architecture) -> tuple[int, ...]:
    assert arch.vision is not None
    return arch.hidden_size, arch.vision.merged_size
