"""Rows of a weight table: how one Megatron parameter is made of Hugging Face tensors, and back.

A row knows names and shapes, not files and not process groups: reading goes through ``Read``, and merging gets the
tensor-parallel shards handed in. The same rows serve loading, export, conversion and the live weight sync.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from rlx.models.architecture import Architecture

Read = Callable[[str, int, int, int], Tensor]
"""``read(name, dim, start, stop)``: the slice [start:stop] along ``dim`` of a Hugging Face tensor."""

NamedTensors = list[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Which of how many tensor-parallel slices."""

    rank: int
    size: int

    def cut(self, extent: int) -> tuple[int, int]:
        part = extent // self.size
        assert part * self.size == extent, f"{extent} does not split into {self.size} equal slices"
        return self.rank * part, (self.rank + 1) * part


def _join(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One tensor of all ranks' slices; of a single rank the slice itself, without a copy."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


class Row(Protocol):
    """One line of a table. ``{layer}`` in names stands for the layer number, ``{expert}`` for the expert's."""

    @property
    def hf_names(self) -> tuple[str, ...]: ...

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        """Full shapes of the Hugging Face tensors, in the order of ``hf_names``."""
        ...

    def load(self, read: Read, names: Sequence[str], shard: Shard, arch: Architecture) -> Tensor:
        """The Megatron slice of ``shard``; ``names`` are the row's names with the layer filled in."""
        ...

    def export(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        """The Hugging Face tensors, in the order of ``hf_names``, from the slices of every rank."""
        ...

    @property
    def is_split(self) -> bool:
        """False where every tensor-parallel rank holds the same tensor."""
        ...


Shape = Callable[[Architecture], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor under another name; split along ``dim`` over tensor-parallel ranks, or not at all (None)."""

    name: str
    shape: Shape
    dim: int | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def is_split(self) -> bool:
        return self.dim is not None

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        return (self.shape(arch),)

    def load(self, read: Read, names: Sequence[str], shard: Shard, arch: Architecture) -> Tensor:
        shape = self.shape(arch)
        if self.dim is None:
            return read(names[0], 0, 0, shape[0])
        return read(names[0], self.dim, *shard.cut(shape[self.dim]))

    def export(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (shards[0],) if self.dim is None else (_join(shards, self.dim),)


@dataclass(frozen=True, slots=True)
class Vocab:
    """An embedding or output matrix [vocabulary, hidden], padded below to a multiple of the tensor-parallel size."""

    name: str

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def is_split(self) -> bool:
        return True

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        return ((arch.vocab_size, arch.hidden_size),)

    def load(self, read: Read, names: Sequence[str], shard: Shard, arch: Architecture) -> Tensor:
        rows = padded_vocab_size(arch.vocab_size, shard.size) // shard.size
        start = min(shard.rank * rows, arch.vocab_size)
        stop = min(start + rows, arch.vocab_size)
        real = read(names[0], 0, start, stop)
        if len(real) == rows:
            return real
        return torch.cat([real, real.new_zeros(rows - len(real), *real.shape[1:])])

    def export(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (_join(shards)[: arch.vocab_size],)


@dataclass(frozen=True, slots=True)
class QKV:
    """Query, key and value projections (or their biases) fused group by group: a query group's heads, its key, its value."""

    query: str
    key: str
    value: str
    bias: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    @property
    def is_split(self) -> bool:
        return True

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        tail = () if self.bias else (arch.hidden_size,)
        rows = (arch.num_heads, arch.num_kv_heads, arch.num_kv_heads)
        return tuple((heads * arch.head_dim, *tail) for heads in rows)

    def load(self, read: Read, names: Sequence[str], shard: Shard, arch: Architecture) -> Tensor:
        if arch.num_kv_heads % shard.size:
            return self._load_part_of_a_group(read, names, shard, arch)
        parts = [read(name, 0, *shard.cut(shape[0])) for name, shape in zip(names, self.hf_shapes(arch), strict=True)]
        groups = arch.num_kv_heads // shard.size
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def _load_part_of_a_group(self, read: Read, names: Sequence[str], shard: Shard, arch: Architecture) -> Tensor:
        """Fewer key-value heads than ranks: Megatron cuts a group's rows evenly, wherever that falls, and gathers the
        products instead."""
        heads = arch.num_heads // arch.num_kv_heads
        extents = (heads * arch.head_dim, arch.head_dim, arch.head_dim)
        start, stop = shard.cut(arch.num_kv_heads * sum(extents))
        group = start // sum(extents)
        first = group * sum(extents)
        pieces = []
        for name, extent in zip(names, extents, strict=True):
            low, high = max(start, first), min(stop, first + extent)
            if low < high:
                offset = group * extent - first
                pieces.append(read(name, 0, low + offset, high + offset))
            first += extent
        return torch.cat(pieces)

    def export(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        fused = _join(shards)
        fused = fused.reshape(arch.num_kv_heads, -1, *fused.shape[1:])
        query_rows = arch.num_heads // arch.num_kv_heads * arch.head_dim
        parts = fused.split([query_rows, arch.head_dim, arch.head_dim], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)


def _dense_size(arch: Architecture) -> int:
    return arch.ffn_hidden_size


@dataclass(frozen=True, slots=True)
class Gated:
    """Gate and up projections of ``size`` rows each (or their biases), one above the other on every rank."""

    gate: str
    up: str
    bias: bool = False
    size: Callable[[Architecture], int] = _dense_size

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    @property
    def is_split(self) -> bool:
        return True

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        rows = self.size(arch)
        return ((rows,) if self.bias else (rows, arch.hidden_size),) * 2

    def load(self, read: Read, names: Sequence[str], shard: Shard, arch: Architecture) -> Tensor:
        return torch.cat([read(name, 0, *shard.cut(self.size(arch))) for name in names])

    def export(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return tuple(_join([half[i] for half in halves]) for i in (0, 1))


@dataclass(frozen=True, slots=True)
class Stacked:
    """The tensors of ``inner`` lie one above the other in one Hugging Face tensor, in the order of its names (which occur
    nowhere else)."""

    name: str
    inner: Row

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def is_split(self) -> bool:
        return self.inner.is_split

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        shapes = self.inner.hf_shapes(arch)
        return ((sum(shape[0] for shape in shapes), *shapes[0][1:]),)

    def load(self, read: Read, names: Sequence[str], shard: Shard, arch: Architecture) -> Tensor:
        rows = [shape[0] for shape in self.inner.hf_shapes(arch)]
        tops = dict(zip(self.inner.hf_names, accumulate(rows, initial=0), strict=False))

        def read_part(part: str, dim: int, start: int, stop: int) -> Tensor:
            assert dim == 0, "stacked tensors split by rows only"
            return read(names[0], 0, tops[part] + start, tops[part] + stop)

        return self.inner.load(read_part, self.inner.hf_names, shard, arch)

    def export(self, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
        return (torch.cat(self.inner.export(shards, arch)),)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tp) * tp
