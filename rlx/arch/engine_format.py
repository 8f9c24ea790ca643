"""What an engine wants of a model's weights: names, shapes and types, between the weight table and what is sent. Pure; no torch.

An engine takes tensors as trainers have them, or with ``fp8`` the matrices of the layers as two: ``X.weight`` in 8 bits, of the
same shape, and ``X.weight_scale_inv``, a fp32 factor for each block of 128 x 128 (the last ones may be smaller). Embedding,
output layer, norms, biases, routers and vision towers stay as they are. It is the format of DeepSeek-V3's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import FAMILIES, weight_table
from rlx.arch.sizes import expected_shapes, names_of

BLOCK = 128
FP8_DTYPE, SCALE_DTYPE = "float8_e4m3fn", "float32"
_WEIGHT, _SCALE = ".weight", ".weight_scale_inv"
_LAYERS, _LINEAR = "decoder.layers.", ".linear_"
# SGLang leaves out by itself what is no linear layer; a tower's would be converted.
_KEPT = ("lm_head", "model.embed_tokens", "visual")
QUANTIZATION: Mapping[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": list(_KEPT),
}
"""What config.json says of such weights, as ``quantization_config``."""


@dataclass(frozen=True, kw_only=True)
class EngineFormat:
    """``shapes`` is the model as trainers have it (Hugging Face name -> shape), ``converted`` the names that go as two tensors.

    >>> two = EngineFormat(shapes={"a.weight": (256, 130), "b.bias": (3,)}, converted=frozenset({"a.weight"}))
    >>> dict(two.expected)
    {'a.weight': (256, 130), 'a.weight_scale_inv': (2, 2), 'b.bias': (3,)}
    """

    shapes: Mapping[str, tuple[int, ...]]
    converted: frozenset[str] = frozenset()

    @cached_property
    def expected(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor that an engine is sent."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            found[name] = shape
            if name in self.converted:
                found[scale_name(name)] = scale_shape(shape)
        return found

    @cached_property
    def dtypes(self) -> Mapping[str, str]:
        """The types, by torch's names, of tensors that have one of their own; others are as trainers have them."""
        return {name: FP8_DTYPE for name in self.converted} | {scale_name(name): SCALE_DTYPE for name in self.converted}

    def num_bytes(self, width: int) -> int:
        """Of everything, where a number that is not converted takes ``width`` bytes."""
        widths = {FP8_DTYPE: 1, SCALE_DTYPE: 4}
        return sum(math.prod(shape) * widths.get(self.dtypes.get(name, ""), width) for name, shape in self.expected.items())


def engine_format(arch: Architecture, *, fp8: bool) -> EngineFormat:
    """What engines that serve ``arch`` want."""
    return EngineFormat(shapes=expected_shapes(arch), converted=converted_names(arch) if fp8 else frozenset())


def converted_names(arch: Architecture) -> frozenset[str]:
    """Hugging Face names of the matrices of the layers."""
    rows = {name: row for name, row in weight_table(arch).items() if name.startswith(_LAYERS) and _LINEAR in name}
    return frozenset(
        hf_name
        for name, row in rows.items()
        if name.endswith(_WEIGHT)
        for hf_names, _ in names_of(name, row, arch)
        for hf_name in hf_names
    )


def scale_name(name: str) -> str:
    """Of the scales that belong to a converted tensor."""
    return name.removesuffix(_WEIGHT) + _SCALE


def is_scale(name: str) -> bool:
    return name.endswith(_SCALE)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def fp8_problems(arch: Architecture, tp: int) -> Iterator[str]:
    """Why engines of ``tp`` ranks cannot serve ``arch`` in FP8: the family, or widths that do not split into whole blocks."""
    if why := FAMILIES[arch.model_type].without_fp8:
        yield f"model.path is of the family {arch.model_type}: {why}"
        return
    if arch.num_heads % tp:
        return  # told of all engines
    for what, width in _widths(arch, tp).items():
        if width % BLOCK:
            yield f"{what} of model.path are {width} wide on each of rollout.tp = {tp} ranks, no multiple of blocks of {BLOCK}"


def _widths(arch: Architecture, tp: int) -> Mapping[str, float]:
    """Rows and columns of converted matrices on a rank, by what they are. A rank has at least one key-value head."""
    found: dict[str, float] = {
        "hidden states": arch.hidden_size,
        "queries": arch.num_heads * arch.head_dim // tp,
        "keys and values": max(1, arch.num_kv_heads // tp) * arch.head_dim,
    }
    experts = arch.experts
    if experts is None or not all(experts.layers):
        found["the MLPs (intermediate_size)"] = arch.ffn_hidden_size / tp
    if experts is not None:
        found["experts"] = experts.hidden_size / tp
        if experts.shared_hidden_size:
            found["shared experts"] = experts.shared_hidden_size / tp
    return {what: int(width) if width == int(width) else width for what, width in found.items()}
