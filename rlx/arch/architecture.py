"""What a model computes, read from a Hugging Face ``config.json``. Knows no Megatron and no tensors.

A field of ``config.json`` that changes the computation is either represented here or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlx.arch.latent import Latent
from rlx.arch.longrope import LongRope

ConfigJson = Mapping[str, Any]
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

    def softmax_scale(self) -> float | None:
        """What attention scores are multiplied by, a rotary embedding's own factor included; None for 1 / sqrt(head_dim)."""
        if not isinstance(self.rope, LongRope):
            return self.attention_scale
        # LongRoPE multiplies rotated queries and rotated keys; the product of both is a factor on the scores.
        return (self.attention_scale or self.head_dim**-0.5) * self.rope.attention_factor**2

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of this number, from 0, is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]


def read_config_json(folder: str | Path) -> ConfigJson:
    """The folder's ``config.json``. Raises ValueError naming what is missing."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"model folder {path} does not exist")
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: a model folder needs its Hugging Face configuration")
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold an object")
    return content


def require(config: ConfigJson, name: str) -> Any:
    """A field that must be there."""
    if config.get(name) is None:
        raise ValueError(f"config.json lacks {name!r}")
    return config[name]


def refuse(config: ConfigJson, name: str, *allowed: Any) -> None:
    """Refuse a field whose value changes the computation in a way that is not built; absent counts as None."""
    value = config.get(name)
    if value not in allowed:
        wanted = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(f"config.json has {name}={value!r}; supported: {wanted}")


def rope_fields(config: ConfigJson) -> dict[str, Any]:
    """``rope_theta``, ``rope`` and ``rope_factor`` from either spelling: ``rope_parameters`` (transformers 5), or
    ``rope_theta`` with ``rope_scaling``."""
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json has a partial_rotary_factor other than 1, which is not supported")
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
            original_max_positions=int(require(parameters, "original_max_position_embeddings")),
        )
        return {"rope_theta": theta, "rope": rope}
    return {"rope_theta": theta}


_ROPE_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
_ANY_ROPE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


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
    refuse(config, "attention_dropout", 0, 0.0, None)
    hidden_size, num_heads = int(require(config, "hidden_size")), int(require(config, "num_attention_heads"))
    return {
        "model_type": require(config, "model_type"),
        "hidden_size": hidden_size,
        "num_layers": int(require(config, "num_hidden_layers")),
        "num_heads": num_heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or num_heads),
        "head_dim": int(config.get("head_dim") or hidden_size // num_heads),
        "ffn_hidden_size": int(require(config, "intermediate_size")),
        "vocab_size": int(require(config, "vocab_size")),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "max_positions": int(config.get("max_position_embeddings", 2048)),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "activation": ACTIVATIONS[config[activation]],
        **rope_fields(config),
    }
