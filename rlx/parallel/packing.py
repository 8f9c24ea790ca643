"""From a packed micro-batch to what one rank feeds its model: the zigzag split and Megatron's packing parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rlx.config.schema import BatchingConfig
from rlx.parallel.context import ParallelContext
from rlx.parallel.context_parallel import local_index
from rlx.types.batch import MicroBatch
from rlx.types.rollout import ImageSpan

# Of a budget of 16,384 tokens the sizes are 256 apart: the padding is below 1 % of a pack that is nearly full.
_NUM_SIZES = 64


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's packing parameters (whose borders count each sequence's padding to it), the true lengths, the pack's images, and
    what a router's balancing losses need.

    lengths_S    true lengths, int64 [S]
    segments_t   the number of each token's sequence, -1 in padding
    weights_S    each sequence's share of the mini-batch's loss tokens
    """

    lengths_S: Tensor | None = None
    segments_t: Tensor | None = None
    weights_S: Tensor | None = None
    images: tuple[ImageSpan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalBatch:
    """One rank's part of a micro-batch (t = T / cp tokens). ``pack`` is the whole, ``index_t`` where the part sits in it."""

    pack: MicroBatch
    index_t: Tensor
    tokens_1t: Tensor
    positions_1t: Tensor
    labels_t: Tensor
    loss_mask_t: Tensor
    packed_seq_params: PackedSequences

    @property
    def sequence_t(self) -> Tensor:
        """The number of each token's sequence in the pack, int64 [t]."""
        return torch.searchsorted(self.pack.cu_seqlens_S1[1:].to(self.index_t), self.index_t, right=True)

    def local(self, column_T: Tensor | None) -> Tensor | None:
        """This rank's part [t] of a column of the pack, on its device; None for one that the pack does not have."""
        return None if column_T is None else column_T.to(self.index_t.device)[self.index_t]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSizes:
    """The few sizes that packs are lengthened to: multiples of ``multiple`` tokens, and ``most``, beyond which none is.

    Kernels and plans are compiled or looked up by shape, and the allocator keeps a block for each: sizes that change with every
    micro-batch cost both, from step to step.
    """

    multiple: int
    most: int

    @classmethod
    def of(cls, batching: BatchingConfig, context: ParallelContext) -> Self:
        """As a configuration says. Unless it does, 64 sizes on GPUs, and no padding on CPUs, which compile nothing."""
        budget, whole = batching.max_tokens_per_micro_batch, context.dims.pack_multiple
        wanted = batching.pad_to_multiple_of
        if wanted is None:
            wanted = 1 << max(0, (budget // _NUM_SIZES).bit_length() - 1) if context.device.type == "cuda" else 1
        return cls(multiple=math.lcm(wanted, whole), most=budget - budget % whole)

    def pad(self, pack: MicroBatch) -> MicroBatch:
        """The pack at its size."""
        num_tokens = pack.tokens_T.shape[0]
        return pad_pack(pack, max(num_tokens, min(self.most, -(-num_tokens // self.multiple) * self.multiple)))


def longest_bound(longest: int, multiple: int) -> int:
    """A bound on the longest sequence that takes few values, four to a doubling, each a multiple of ``multiple``: attention plans
    its kernels anew for every other one."""
    step = max(64, 1 << max(0, longest.bit_length() - 3))
    return -(-longest // step * step // multiple) * multiple


def pad_pack(pack: MicroBatch, num_tokens: int) -> MicroBatch:
    """Lengthen the padding of the last sequence until the pack holds ``num_tokens``."""
    extra = num_tokens - pack.tokens_T.shape[0]
    if extra == 0:
        return pack
    cu_seqlens = pack.cu_seqlens_S1.clone()
    cu_seqlens[-1] += extra
    return replace(
        pack,
        tokens_T=F.pad(pack.tokens_T, (0, extra)),
        labels_T=F.pad(pack.labels_T, (0, extra)),
        loss_mask_T=F.pad(pack.loss_mask_T, (0, extra)),
        cu_seqlens_S1=cu_seqlens,
        columns=pack.columns.map(lambda _, column_T: F.pad(column_T, (0, extra))),
    )


def local_batch(pack: MicroBatch, context: ParallelContext, num_loss_tokens: float = 1.0) -> LocalBatch:
    """This rank's part of ``pack``, on its device; ``num_loss_tokens`` are those of its mini-batch over all ranks."""
    device = context.device
    cu_seqlens = pack.cu_seqlens_S1.to(device)
    index_t = local_index(cu_seqlens, context.dims.cp, context.cp_rank)
    starts = torch.repeat_interleave(cu_seqlens[:-1], (cu_seqlens[1:] - cu_seqlens[:-1]).long())
    positions_t = index_t - starts[index_t]
    segments_T, lengths_S = torch.repeat_interleave((cu_seqlens[1:] - cu_seqlens[:-1]).long()), pack.lengths_S.to(device)
    weights_S = (
        torch.zeros(len(lengths_S), device=device).index_add_(0, segments_T, pack.loss_mask_T.to(device)) / num_loss_tokens
    )
    longest = longest_bound(pack.max_seqlen, context.dims.sequence_multiple)
    segments_t = torch.where(positions_t < lengths_S[segments_T[index_t]], segments_T[index_t], -1)
    params = PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths_S=lengths_S,
        segments_t=segments_t,
        weights_S=weights_S,
        images=pack.images,
    )
    return LocalBatch(
        pack=pack,
        index_t=index_t,
        tokens_1t=pack.tokens_T.to(device)[index_t][None],
        positions_1t=positions_t[None],
        labels_t=pack.labels_T.to(device)[index_t],
        loss_mask_t=pack.loss_mask_T.to(device)[index_t],
        packed_seq_params=params,
    )
