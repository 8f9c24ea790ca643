"""The search for tensors that an engine holds differently, where it can hand them out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlx.rollout.sglang.control import EngineControl, EngineControlError
from rlx.types.precision import Precision
from rlx.types.weights import torch_dtype

# Tensors come back as JSON, ten bytes or more a number: of larger ones only the first rows are compared.
_COMPARED_ELEMENTS = 2**18
_VOCAB_MULTIPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """``culprits`` in words, how many tensors were compared, how many of them by their first rows or one rank's share only,
    and why the engine did not hand out its tensors, where it did not."""

    culprits: list[str] = field(default_factory=list)
    num_tensors: int = 0
    num_by_rows: int = 0
    num_by_share: int = 0
    refusals: list[str] = field(default_factory=list)

    @property
    def is_proof(self) -> bool:
        """No tensor differs, and no rank's share of one is unknown."""
        return not self.culprits and not self.refusals and not self.num_by_share and self.num_tensors > 0


def merge(parts: Sequence[Findings]) -> Findings:
    """Of all stages."""
    return Findings(
        culprits=[text for part in parts for text in part.culprits],
        num_tensors=sum(part.num_tensors for part in parts),
        num_by_rows=sum(part.num_by_rows for part in parts),
        num_by_share=sum(part.num_by_share for part in parts),
        refusals=[text for part in parts for text in part.refusals],
    )


def find_culprits(control: EngineControl, tensors: Iterator[tuple[str, Tensor]], precision: Precision) -> Findings:
    """Compare the engine's tensors with ``tensors`` bit for bit in the engine's ``precision``.

    Drives ``tensors`` to its end. Of a tensor of more than 256 Ki elements only the first rows are compared, and of a
    tensor-parallel engine its first rank's share.
    """
    culprits: list[str] = []
    refusals: list[str] = []
    counts = [0, 0, 0]
    for name, tensor in tensors:
        if refusals:
            continue
        rows = max(1, _COMPARED_ELEMENTS * tensor.shape[0] // max(1, tensor.numel()))
        ours = tensor.detach()[:rows].to(torch_dtype(precision.torch_name)).float().cpu()
        try:
            theirs = _without_padding(torch.tensor(control.weights_by_name(name, rows), dtype=torch.float32), ours)
        except EngineControlError as error:
            refusals.append(f"the engine does not give its tensors: {error}")
            continue
        difference = _difference(ours, theirs)
        if difference != 0.0:
            culprits.append(f"{name} (by up to {difference:.3g})")
        counts[0] += 1
        counts[1] += rows < tensor.shape[0]
        counts[2] += theirs.shape != ours.shape
    return Findings(culprits=culprits, num_tensors=counts[0], num_by_rows=counts[1], num_by_share=counts[2], refusals=refusals)


def _without_padding(theirs: Tensor, ours: Tensor) -> Tensor:
    """SGLang holds vocabularies padded with rows of zeros to a multiple of 64, and hands those out as well."""
    num_rows = ours.shape[0]
    if 0 < theirs.shape[0] - num_rows < _VOCAB_MULTIPLE and theirs.shape[1:] == ours.shape[1:] and not theirs[num_rows:].any():
        return theirs[:num_rows]
    return theirs


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest |difference| of what both hold; NaN where shapes do not even match."""
    if theirs.dim() != ours.dim() or any(got > own for got, own in zip(theirs.shape, ours.shape, strict=True)):
        return math.nan
    share = ours[tuple(slice(extent) for extent in theirs.shape)]
    differs = ~((share == theirs) | (share.isnan() & theirs.isnan()))
    return float((share - theirs).abs()[differs].max()) if bool(differs.any()) else 0.0
