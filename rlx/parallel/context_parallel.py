"""The zigzag layout of context parallelism over packed sequences.

Each sequence of length n (a multiple of 2 x cp) is cut into 2 x cp chunks; rank r holds chunks r and 2 x cp - 1 - r, so
that causal attention costs every rank the same. Legend: T tokens of the whole pack, t = T / cp tokens of one rank.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def local_index(cu_seqlens_S1: Tensor, cp: int, rank: int) -> Tensor:
    """Positions in the pack that ``rank`` holds, int64 [t], in its own order.

    Example: one sequence of 8, cp 2: rank 0 holds 0 1 6 7, rank 1 holds 2 3 4 5.
    """
    if cp == 1:
        return torch.arange(int(cu_seqlens_S1[-1]), device=cu_seqlens_S1.device)
    pieces = []
    borders = cu_seqlens_S1.tolist()
    for start, end in pairwise(borders):
        chunk, rest = divmod(end - start, 2 * cp)
        assert rest == 0, f"sequence of {end - start} tokens does not split into 2 x cp = {2 * cp} chunks"
        late = 2 * cp - 1 - rank
        pieces.append(torch.arange(start + rank * chunk, start + (rank + 1) * chunk))
        pieces.append(torch.arange(start + late * chunk, start + (late + 1) * chunk))
    return torch.cat(pieces).to(cu_seqlens_S1.device)


def gather_pack(local: Tensor, cu_seqlens_S1: Tensor, group: ProcessGroup) -> Tensor:
    """[t, ...] of every rank -> [T, ...] in pack order. Without gradient."""
    cp = group.size()
    if cp == 1:
        return local
    received = [torch.empty_like(local) for _ in range(cp)]
    dist.all_gather(received, local.contiguous(), group=group)
    pack = local.new_empty((local.shape[0] * cp, *local.shape[1:]))
    for rank, piece in enumerate(received):
        pack[local_index(cu_seqlens_S1, cp, rank)] = piece
    return pack


class _GatherPack(torch.autograd.Function):
    """``gather_pack`` with gradient: every rank used the whole pack, so the gradient is summed before the split."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, cu_seqlens_S1: Tensor, group: ProcessGroup) -> Tensor:
        ctx.cu_seqlens_S1, ctx.group = cu_seqlens_S1, group
        return gather_pack(local, cu_seqlens_S1, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[local_index(ctx.cu_seqlens_S1, ctx.group.size(), ctx.group.rank())], None, None


def gather_pack_with_grad(local: Tensor, cu_seqlens_S1: Tensor, group: ProcessGroup) -> Tensor:
    """[t, ...] of every rank -> [T, ...] in pack order, differentiable."""
    if group.size() == 1:
        return local
    gathered: Tensor = _GatherPack.apply(local, cu_seqlens_S1, group)  # type: ignore[no-untyped-call]
    return gathered


class _SumOverGroup(torch.autograd.Function):
    """Every rank's loss may use the sum, so the gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = local.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_group(local: Tensor, group: ProcessGroup) -> Tensor:
    """``local`` of all ranks added up, on every rank, differentiable. Collective, also in the backward pass."""
    if group.size() == 1:
        return local
    total: Tensor = _SumOverGroup.apply(local, group)  # type: ignore[no-untyped-call]
    return total
