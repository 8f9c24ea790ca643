"""Rotary position embedding of a whole pack at once, without Transformer Engine's fused kernel.

Megatron's unfused one rotates a pack sequence by sequence: tens of thousands of small kernels a pass over short answers.
It also takes angles for every token of a pack, and that pack as a single sequence. Legend: T tokens, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from rlx.data.images.grid import pack_positions
from rlx.parallel.packing import PackedSequences


class PackRotary(nn.Module):
    """Stands where Megatron's rotary embedding stood. The model hands what ``get_rotary_seq_len`` gave to ``forward``."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        super().__init__()
        self.inverse_frequencies = inverse_frequencies
        self.rotates_pack = True

    def get_rotary_seq_len(self, *args: Any) -> Any:
        """The packing parameters, Megatron's last argument."""
        return args[-1]

    def forward(self, packed: Any, **kwargs: Any) -> Tensor:
        """Angles of every token of the pack, float32 [T, 1, 1, K]."""
        borders = packed.cu_seqlens_q.long()
        starts = borders[:-1].repeat_interleave(borders[1:] - borders[:-1])
        positions = torch.arange(starts.shape[0], device=borders.device) - starts
        angles = positions[:, None].float() * self.inverse_frequencies
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class GridRotary(PackRotary):
    """The same where a token has a position along time, height and width: ``axes`` says which of them turns each frequency.

    ``rotates_pack`` is False beside Transformer Engine's attention, which goes by the borders that ``rotated_as_one`` changes.
    """

    def __init__(self, inverse_frequencies: Tensor, axes: Sequence[int], merge: int, *, rotates_pack: bool) -> None:
        super().__init__(inverse_frequencies)
        self.rotates_pack = rotates_pack
        self.axes, self.merge = torch.tensor(axes, device=inverse_frequencies.device), merge

    def forward(self, packed: Any, **kwargs: Any) -> Tensor:
        """Angles of every token of the pack, float32 [T, 1, 1, K]."""
        if not packed.images:
            return super().forward(packed)
        positions_3T = torch.from_numpy(pack_positions(packed.cu_seqlens_q.tolist(), packed.images, self.merge))
        angles = positions_3T.to(self.axes.device)[self.axes].T.float() * self.inverse_frequencies
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def rotated_as_one(model: nn.Module, packed: PackedSequences) -> PackedSequences:
    """``packed`` with the borders that ``PackRotary`` wants Megatron to rotate by: those of the whole pack.

    Attention keeps to ``cu_seqlens_q``. Under context parallelism nothing changes: a rank's part is cut out sequence by
    sequence.
    """
    rotary = getattr(model, "rotary_pos_emb", None)  # latent attention has its own in each layer
    config: Any = model.config
    if not (isinstance(rotary, PackRotary) and rotary.rotates_pack) or config.context_parallel_size > 1:
        return packed
    rotated = copy(packed)
    rotated.cu_seqlens_q_padded = rotated.cu_seqlens_kv_padded = packed.cu_seqlens_q[[0, -1]]
    return rotated
