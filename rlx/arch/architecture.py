"""What a model computes, read from a Hugging Face ``config.json``. Knows no Megatron and no tensors.

A field of ``config.json`` that changes the computation is either represented here or refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlx.arch.fields import ConfigJson, is_number, refuse, require
from rlx.arch.latent import Latent
from rlx.arch.longrope import LongRope
from rlx.arch.vision import Vision

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 (Grattafiori et al. 2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Mixture of experts: which layers have it, the experts' sizes, and how a token's scores become experts and weights.

    ``normalise`` divides the chosen weights by their sum; ``scale`` multiplies them afterwards. With ``num_groups`` > 1
    only the ``top_groups`` best groups take part, a group being rated by the sum of its ``group_rating`` best experts.
    ``score_bias`` adds a stored bias to the scores for the choice only. ``shared_hidden_size`` 0: no shared expert.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    layers: tuple[bool, ...]
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_rating: int = 1
    score_bias: bool = False
    shared_hidden_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder: sizes in elements, ``rope`` None for plain rotary embeddings, or their scaling.

    attention_scale     what scores are multiplied by; None for 1 / sqrt(head_dim)
    attention_softcap   c in c * tanh(score / c), after the scale; None for none. ``final_softcap`` is the logits' one
    window              a token sees itself and the window - 1 tokens before it, in the layers that ``windowed_layers``
                        marks (all layers when it is empty); None for no window
    zero_centered_norm  norms multiply by 1 + weight
    post_norms          attention and MLP outputs are normed before they join the residual stream
    embedding_scale     what embeddings are multiplied by, rounded to the model's dtype first
    latent              multi-head latent attention, rotary embedding included; None for heads of ``head_dim``
    rotary_axes         for each frequency of the rotary embedding the position that turns it: 0 time, 1 height, 2 width; empty
                        where a token has one position
    vision              the tower that images go through; None for a model of text
    experts             mixture of experts; None where all layers are dense. ``ffn_hidden_size`` is that of dense layers
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool
    rope: Llama3Rope | LongRope | None = None
    rope_factor: float = 1.0
    qkv_bias: bool = False
    projection_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    window: int | None = None
    windowed_layers: tuple[bool, ...] = ()
    zero_centered_norm: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    experts: Experts | None = None
    latent: Latent | None = None
    rotary_axes: tuple[int, ...] = ()
    vision: Vision | None = None

    @property
    def shape(self) -> tuple[object, ...]:
        """What weights and layouts depend on; equal for models that can play different roles in one run."""
        experts = None if self.experts is None else (self.experts.num_experts, self.experts.hidden_size, self.experts.layers)
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        sizes = (self.vocab_size, self.num_layers, self.hidden_size, heads, self.ffn_hidden_size)
        return (self.model_type, *sizes, experts, self.vision)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """ValueError for a token id that has no row in the embedding."""
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise ValueError(f"token {wrong} is outside the vocabulary of {self.vocab_size}")

    def softmax_scale(self) -> float | None:
        """What attention scores are multiplied by, a rotary embedding's own factor included; None for 1 / sqrt(head_dim)."""
        if not isinstance(self.rope, LongRope):
            return self.attention_scale
        # LongRoPE multiplies rotated queries and rotated keys; the product of both is a factor on the scores.
        return (self.attention_scale or self.head_dim**-0.5) * self.rope.attention_factor**2

    @property
    def gates_in_one_kernel(self) -> bool:
        """Whether Megatron's kernel for the gated activation (silu, without experts) computes the MLPs'."""
        return self.activation == "silu" and self.experts is None

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of this number, from 0, is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]


def check_numbers(arch: Architecture) -> Architecture:
    """The architecture, if its numbers can be those of a model; ValueError says what cannot."""
    if arch.num_heads % arch.num_kv_heads:
        raise ValueError(f"config.json has {arch.num_heads} attention heads, no multiple of {arch.num_kv_heads} key-value heads")
    if arch.head_dim % 2:
        raise ValueError(f"config.json has heads of {arch.head_dim}, which rotary embeddings cannot pair up")
    experts = arch.experts
    if experts is not None and experts.num_experts % experts.num_groups:
        raise ValueError(f"config.json has {experts.num_experts} experts, no multiple of {experts.num_groups} groups")
    if experts is not None and experts.top_k > experts.top_groups * experts.num_experts // experts.num_groups:
        raise ValueError(f"config.json chooses {experts.top_k} experts a token, more than {experts.num_experts} experts allow")
    return arch


def read_config_json(folder: str | Path) -> ConfigJson:
    """The ``config.json`` of a folder. Raises ValueError naming what is missing or wrong."""
    path = Path(folder)
    if not os.path.isdir(path):
        raise ValueError(f"no such folder {path}; expected a Hugging Face folder with config.json")
    file = path / "config.json"
    if not os.path.isfile(file):
        raise ValueError(f"{file} is missing: a model folder needs its Hugging Face configuration")
    return parse_config_json(file)


def parse_config_json(file: Path) -> ConfigJson:
    """The object that a file holds; ValueError when it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content


def has_tower(folder: str | Path) -> bool:
    """Whether a folder's model sees images: its config.json describes a tower. False where there is nothing to read."""
    try:
        return bool(read_config_json(folder).get("vision_config"))
    except ValueError:
        return False


def is_megatron_checkpoint(folder: str | Path) -> bool:
    """Whether a model folder holds a Megatron distributed checkpoint rather than Hugging Face weights."""
    return os.path.isfile(Path(folder) / "metadata.json")


def rope_parameters(config: ConfigJson) -> dict[str, Any]:
    """Rotary embedding as transformers takes it from either spelling: ``rope_parameters`` (transformers 5), or ``rope_theta``
    with ``rope_scaling``. Always with ``rope_type`` and ``rope_theta``; the original context where the type has one."""
    found = dict(config["rope_scaling"] or config["rope_parameters"] or {})
    older = found.pop("type", None)
    kind = found["rope_type"] = str(found.get("rope_type") or older or "default")
    found.setdefault("rope_theta", config["rope_theta"])
    if config["partial_rotary_factor"] is not None:
        found.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if found.pop("partial_rotary_factor", None) not in (None, 1):
        raise ValueError("config.json has a partial_rotary_factor other than 1, which is not supported")
    if kind in _FROM_A_SHORTER_CONTEXT and found.get("original_max_position_embeddings") is None:
        found["original_max_position_embeddings"] = config["max_position_embeddings"]
    for name, value in found.items():
        is_list = isinstance(value, list) and name not in _ROPE_DIVISORS  # factors, one a frequency
        if name != "rope_type" and not is_list and value is not None and not is_number(value):
            raise ValueError(f"config.json has {name}={value!r} in its rope parameters; expected a number")
        if name in _ROPE_DIVISORS and is_number(value) and value <= 0:
            raise ValueError(f"config.json has {name}={value!r} in its rope parameters; expected a number above 0")
    return found


def rope_fields(config: ConfigJson) -> dict[str, Any]:
    """``rope_theta``, ``rope`` and ``rope_factor`` of the types that every family may have."""
    parameters = rope_parameters(config)
    kind, theta = parameters["rope_type"], float(require(parameters, "rope_theta"))
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"config.json has rope type {kind!r}; supported: {', '.join(map(repr, _ROPE_FIELDS))}")
    _refuse_unknown_rope_fields(parameters, kind)
    if kind == "linear":
        return {"rope_theta": theta, "rope_factor": float(require(parameters, "factor"))}
    if kind == "llama3":
        rope = Llama3Rope(
            factor=float(require(parameters, "factor")),
            low_freq_factor=float(require(parameters, "low_freq_factor")),
            high_freq_factor=float(require(parameters, "high_freq_factor")),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
        return {"rope_theta": theta, "rope": rope}
    return {"rope_theta": theta}


_ROPE_DIVISORS = frozenset({"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})
_FROM_A_SHORTER_CONTEXT = ("llama3", "yarn", "longrope")
_ROPE_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
_ANY_ROPE = frozenset({"rope_type", "rope_theta"})


def _refuse_unknown_rope_fields(parameters: Mapping[str, Any], kind: str) -> None:
    unknown = sorted(
        name for name, value in parameters.items() if name not in _ANY_ROPE | _ROPE_FIELDS[kind] and value is not None
    )
    if unknown:
        raise ValueError(f"config.json has {', '.join(unknown)} in its rope parameters, which rope type {kind!r} does not know")


def window_fields(window: int | None, layer_types: Sequence[str], num_layers: int) -> dict[str, Any]:
    """``window`` and ``windowed_layers`` from Hugging Face's ``sliding_window`` and ``layer_types``."""
    unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"config.json has layer_types {', '.join(unknown)}; supported: full_attention, sliding_attention")
    if len(layer_types) != num_layers:
        raise ValueError(f"config.json has {len(layer_types)} layer_types for num_hidden_layers={num_layers}")
    windowed = tuple(kind == "sliding_attention" for kind in layer_types)
    if not any(windowed):
        return {}
    if window is None:
        raise ValueError("config.json has layer_types with sliding_attention, but no sliding_window")
    return {"window": int(window), "windowed_layers": windowed}


def common_fields(config: ConfigJson, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields that every decoder of the Llama lineage spells alike; ``activation`` names the MLP's one."""
    refuse(config, activation, *ACTIVATIONS)
    refuse(config, "attention_dropout", 0, None)
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    if config["head_dim"] is None and hidden_size % num_heads:
        raise ValueError(f"config.json has hidden_size={hidden_size}, no multiple of num_attention_heads={num_heads}")
    return {
        "model_type": config["model_type"],
        "hidden_size": hidden_size,
        "num_layers": config["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": config["num_key_value_heads"] or num_heads,
        "head_dim": config["head_dim"] or hidden_size // num_heads,
        "ffn_hidden_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "norm_eps": float(config["rms_norm_eps"]),
        "max_positions": config["max_position_embeddings"],
        "tied_embeddings": config["tie_word_embeddings"],
        "activation": ACTIVATIONS[config[activation]],
        **rope_fields(config),
    }
