"""Tensors by the rows of a weight table: Megatron slices out of Hugging Face tensors, and back.

Reading goes through ``Read``, and merging gets the tensor-parallel shards handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlx.arch.architecture import Architecture
from rlx.arch.weights import Row, Shard, Vocab

Read = Callable[[str, int, int, int], Tensor]
"""``read(name, dim, start, stop)``: the slice [start:stop] along ``dim`` of a Hugging Face tensor."""


def load(row: Row, read: Read, names: Sequence[str], shard: Shard, arch: Architecture) -> Tensor:
    """The Megatron slice of ``shard``; ``names`` are the row's names with the layer filled in."""
    runs = row.runs(shard, arch)
    found = _join([read(names[run.tensor], run.dim, run.start, run.stop) for run in runs], runs[0].dim)
    missing = row.num_rows(shard, arch) - len(found) if isinstance(row, Vocab) else 0
    return torch.cat([found, found.new_zeros(missing, *found.shape[1:])]) if missing else found


def export(row: Row, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
    """The Hugging Face tensors, in the order of ``hf_names``, from the slices of every rank."""
    found: list[list[tuple[int, Tensor]]] = [[] for _ in row.hf_names]
    dim = 0
    for rank, slice_ in enumerate(shards if row.is_split else shards[:1]):
        at = 0
        for run in row.runs(Shard(rank=rank, size=len(shards)), arch):
            found[run.tensor].append((run.start, slice_.narrow(run.dim, at, run.stop - run.start)))
            dim, at = run.dim, at + run.stop - run.start
    return tuple(_join([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])], dim) for pieces in found)


def _join(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """One tensor of all; without a copy where there is one, or where they lie one behind the other."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(list(pieces), dim=dim) if dim or not _are_in_a_row(pieces) else _as_one(pieces)


def _are_in_a_row(pieces: Sequence[Tensor]) -> bool:
    if not all(piece.is_contiguous() and piece.numel() for piece in pieces):
        return False
    ends = [piece.data_ptr() + piece.nbytes for piece in pieces]
    first = pieces[0].untyped_storage().data_ptr()
    return ends[:-1] == [piece.data_ptr() for piece in pieces[1:]] and all(
        piece.untyped_storage().data_ptr() == first for piece in pieces
    )


def _as_one(pieces: Sequence[Tensor]) -> Tensor:
    first = pieces[0]
    return first.as_strided((sum(map(len, pieces)), *first.shape[1:]), first.stride())
