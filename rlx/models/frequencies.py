"""Rotary frequencies of an architecture, and the embedding that uses both sets of LongRoPE (Ding et al. 2024).

A sequence longer than the original context is rotated with the long factors, a shorter one with the short factors, as
transformers does for a sequence on its own. Legend: T tokens of the pack, S sequences, K head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlx.arch.architecture import Architecture, Llama3Rope
from rlx.arch.longrope import LongRope


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Rotary inverse frequencies, float32 [K / 2]; without the two sets of factors of LongRoPE."""
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim
    frequencies = 1.0 / arch.rope_theta**exponents / arch.rope_factor
    if not isinstance(arch.rope, Llama3Rope):
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # Blend from unscaled (short wavelengths) to scaled (long ones) between the two border wavelengths.
    turns = arch.rope.original_max_positions / wavelengths
    span = arch.rope.high_freq_factor - arch.rope.low_freq_factor
    keep = ((turns - arch.rope.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / arch.rope.factor


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
