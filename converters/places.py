"""Where each parameter lies in a Megatron checkpoint, by a rule that needs no Megatron.

Megatron says the same (``skeleton``), seconds later: a conversion begins by the rule and ends only if both agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from converters.plan import Cutter, Parameter, num_experts, parameters
from rlx.arch.architecture import Architecture
from rlx.arch.weights import (
    Gated,
    Row,
    Shard,
    Stacked,
)

_MAX_SHOWN = 20
# Norms that Megatron keeps inside the linear layer that follows them; the layers of latent attention keep them apart.
_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A block of a stored tensor that one parameter, or one of its halves, fills. Shapes count the axes of layers and
    experts, ``num_prepended`` of them, which the parameter itself does not have."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    num_prepended: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalTensor:
    """Shape of a stored tensor, and torch's name of its type."""

    shape: tuple[int, ...]
    dtype: str


Places = Mapping[tuple[str, ...], tuple[Piece, ...]]
"""The pieces by the Hugging Face names of a parameter, in the order in which they make it up along its first axis."""


def places(arch: Architecture) -> Places:
    """The pieces of every parameter."""
    cutter = Cutter(arch)
    shapes: dict[Row, tuple[int, ...]] = {}
    found = {}
    for parameter in parameters(arch):
        if parameter.row not in shapes:
            shapes[parameter.row] = cutter.shape(parameter, Shard(rank=0, size=1))
        found[parameter.hf_names] = tuple(_pieces(parameter, shapes[parameter.row], arch))
    return found


def _pieces(parameter: Parameter, shape: tuple[int, ...], arch: Architecture) -> Iterator[Piece]:
    name, extents, at = parameter.name, [], []
    if arch.latent is None:
        for plain, fused in _FUSED_NORMS.items():
            name = name.replace("{layer}." + plain, "{layer}." + fused)
    if parameter.layer is not None:
        if _is_uniform(arch):
            name = name.replace("{layer}.", "")
            extents, at = [arch.num_layers], [parameter.layer]
        else:
            name = name.replace("{layer}", str(parameter.layer))
    if parameter.expert is not None:
        name = name.replace("{expert}", "experts")
        extents, at = [*extents, num_experts(arch)], [*at, parameter.expert]
    halves = 2 if _is_gated(parameter.row) else 1
    rows = shape[0] // halves
    for half in range(halves):
        yield Piece(
            key=name,
            global_shape=(*extents, *shape),
            offset=(*at, half * rows, *(0 for _ in shape[1:])),
            shape=(*(1 for _ in extents), rows, *shape[1:]),
            num_prepended=len(extents),
        )


def _is_uniform(arch: Architecture) -> bool:
    """Whether all layers have the same parameters, which Megatron then stacks."""
    return arch.experts is None or all(arch.experts.layers)


def _is_gated(row: Row) -> bool:
    return isinstance(row.inner if isinstance(row, Stacked) else row, Gated)


def check_agreement(ours: Places, theirs: Places) -> None:
    """ValueError names the parameters that Megatron stores elsewhere than the rule says."""
    differing = [
        f"{' + '.join(names)}: the rule says {_words(ours.get(names))}, Megatron says {_words(theirs.get(names))}"
        for names in sorted(ours.keys() | theirs.keys())
        if ours.get(names) != theirs.get(names)
    ]
    if differing:
        more = f"\n  and {len(differing) - _MAX_SHOWN} more" if len(differing) > _MAX_SHOWN else ""
        shown = "\n  ".join(differing[:_MAX_SHOWN])
        raise ValueError(f"this Megatron stores parameters elsewhere than the converter's rule says:\n  {shown}{more}")


def _words(pieces: tuple[Piece, ...] | None) -> str:
    if pieces is None:
        return "nothing"
    return " and ".join(f"{piece.key} {list(piece.global_shape)} at {list(piece.offset)}" for piece in pieces)
