"""LongRoPE (Ding et al. 2024): two sets of rotary frequencies, chosen sequence by sequence.

A sequence longer than the original context is rotated with the long factors, a shorter one with the short factors, as
transformers does for a sequence on its own. Legend: T tokens of the pack, S sequences, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """Divisors of the inverse frequencies ([K / 2] each), the length up to which the short ones hold, and the factor on
    rotated queries and keys."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


class LongRotary(nn.Module):
    """Stands where Megatron's rotary embedding stood. The model hands what ``get_rotary_seq_len`` gave to ``forward``:
    here the whole description of the pack, since a length alone does not say which sequences are long."""

    def __init__(self, rope: LongRope, inverse_frequencies: Tensor) -> None:
        super().__init__()
        self.original_max_positions = rope.original_max_positions
        device = inverse_frequencies.device
        self.short = inverse_frequencies / torch.tensor(rope.short_factors, dtype=torch.float32, device=device)
        self.long = inverse_frequencies / torch.tensor(rope.long_factors, dtype=torch.float32, device=device)

    def get_rotary_seq_len(self, *args: Any) -> Any:
        """The packing parameters (``rlx.parallel.packing.PackedSequences``), Megatron's last argument."""
        return args[-1]

    def forward(self, packed: Any, **kwargs: Any) -> Tensor:
        """Angles of every token of the pack, float32 [T, 1, 1, K]; Megatron cuts out this rank's part."""
        borders = packed.cu_seqlens_q_padded.long()
        extents = borders[1:] - borders[:-1]
        positions = torch.arange(int(borders[-1]), device=borders.device) - borders[:-1].repeat_interleave(extents)
        # The true length decides: padding must not turn a short sequence into a long one.
        is_long = (packed.lengths_S > self.original_max_positions).repeat_interleave(extents)
        frequencies = torch.where(is_long[:, None], self.long, self.short)
        angles = positions[:, None].float() * frequencies
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
