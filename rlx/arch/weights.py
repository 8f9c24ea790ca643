"""Rows of a weight table: how one Megatron parameter is made of Hugging Face tensors.

A row is data: names, shapes and runs. It knows no tensors, no files and no process groups. ``row_tensors`` loads and exports
by it. The same rows serve loading, export, conversion and the live weight sync.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from rlx.arch.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Which of how many tensor-parallel slices."""

    rank: int
    size: int

    def cut(self, extent: int) -> tuple[int, int]:
        part = extent // self.size
        assert part * self.size == extent, f"{extent} does not split into {self.size} equal slices"
        return self.rank * part, (self.rank + 1) * part


@dataclass(frozen=True, slots=True)
class Run:
    """[start, stop) along ``dim`` of the tensor that stands at ``tensor`` in a row's names."""

    tensor: int
    dim: int
    start: int
    stop: int


class Row(Protocol):
    """One line of a table. ``{layer}`` in names stands for the number of the layer, or of the tower's block; ``{expert}`` for the
    expert's."""

    @property
    def hf_names(self) -> tuple[str, ...]: ...

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        """Full shapes of the Hugging Face tensors, in the order of ``hf_names``."""

    def runs(self, shard: Shard, arch: Architecture) -> Sequence[Run]:
        """What the Megatron slice of ``shard`` is made of, in order, along one dimension. Padding is no run."""

    @property
    def is_split(self) -> bool:
        """False where every tensor-parallel rank holds the same tensor."""


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

    def runs(self, shard: Shard, arch: Architecture) -> Sequence[Run]:
        shape = self.shape(arch)
        return (Run(0, 0, 0, shape[0]) if self.dim is None else Run(0, self.dim, *shard.cut(shape[self.dim])),)


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

    def runs(self, shard: Shard, arch: Architecture) -> Sequence[Run]:
        start = min(shard.rank * self.num_rows(shard, arch), arch.vocab_size)
        return (Run(0, 0, start, min(start + self.num_rows(shard, arch), arch.vocab_size)),)

    def num_rows(self, shard: Shard, arch: Architecture) -> int:
        """Rows of the slice, padding included."""
        return padded_vocab_size(arch.vocab_size, shard.size) // shard.size


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

    def runs(self, shard: Shard, arch: Architecture) -> Sequence[Run]:
        """With fewer key-value heads than ranks too: Megatron then cuts the fused rows evenly, wherever that falls in a
        group, and gathers the products instead."""
        extents = (arch.num_heads // arch.num_kv_heads * arch.head_dim, arch.head_dim, arch.head_dim)
        start, stop = shard.cut(arch.num_kv_heads * sum(extents))
        found, first = [], 0
        for group in range(arch.num_kv_heads):
            for tensor, extent in enumerate(extents):
                low, high = max(start - first, 0), min(stop - first, extent)
                if low < high:
                    found.append(Run(tensor, 0, group * extent + low, group * extent + high))
                first += extent
        return found


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

    def runs(self, shard: Shard, arch: Architecture) -> Sequence[Run]:
        return tuple(Run(tensor, 0, *shard.cut(self.size(arch))) for tensor in (0, 1))


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

    def runs(self, shard: Shard, arch: Architecture) -> Sequence[Run]:
        tops = list(accumulate((shape[0] for shape in self.inner.hf_shapes(arch)), initial=0))
        inner = self.inner.runs(shard, arch)
        assert all(run.dim == 0 for run in inner), "stacked tensors split by rows only"
        return tuple(Run(0, 0, tops[run.tensor] + run.start, tops[run.tensor] + run.stop) for run in inner)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tp) * tp
