"""What a conversion moves and how it is cut into files: computed from the configuration alone. Knows no Megatron
and no torch; where Megatron keeps each parameter it is told."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rlx.arch.architecture import Architecture
from rlx.arch.families.experts import TOWER_ROWS, layers_of
from rlx.arch.families.registry import weight_table
from rlx.arch.layout import layers_per_chunk
from rlx.arch.layout import layout_problems as model_problems
from rlx.arch.weights import (
    QKV,
    Row,
    Shard,
    Vocab,
)
from rlx.types.layout import ParallelDims
from rlx.types.precision import PRECISIONS

DTYPES = {precision.name: precision.torch_name for precision in PRECISIONS.values()}
PART_BYTES = 16 * 2**20
"""A parameter is moved in parts of about this size where its row can be split so far; memory is bounded by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The layout that a checkpoint is cut for; any other can load it. ``etp`` is the experts' tensor-parallel size."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def ranks_per_stage(self) -> int:
        return math.lcm(self.tp, self.ep * self.etp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One Megatron parameter of the whole model: its row, with layer and expert (None where it has none) filled in. ``name``
    is the row's Megatron name, with ``{layer}`` and ``{expert}`` left open."""

    name: str
    row: Row
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layer: int | None
    expert: int | None
    is_first_stage: bool

    @property
    def num_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.hf_shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is moved at once: one slice of a parameter. ``axis`` is the split one, of the parameter's own dimensions."""

    parameter: Parameter
    shard: Shard
    axis: int

    @property
    def num_elements(self) -> int:
        return self.parameter.num_elements // self.shard.size


Position = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A block of a stored tensor that one parameter, or one of its halves, fills. Shapes count the axes of layers and
    experts, ``num_prepended`` of them, which the parameter itself does not have."""

    key: str
    global_shape: Position
    offset: Position
    shape: Position
    num_prepended: int


Places = Mapping[tuple[str, ...], tuple[Piece, ...]]
"""The pieces by the Hugging Face names of a parameter, in the order in which they make it up along its first axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalTensor:
    """Shape of a stored tensor, and torch's name of its type."""

    shape: Position
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """One file: the unit of parallelism and of resuming."""

    name: str
    rank: int
    parts: Sequence[Part] = field(repr=False)


def parameters(arch: Architecture) -> list[Parameter]:
    """Every parameter of the model, in the order of the table."""
    found = []
    for name, row in weight_table(arch).items():
        experts: Iterable[int | None] = range(num_experts(arch)) if "{expert}" in name else (None,)
        for layer, expert in itertools.product(layers_of(name, arch), experts):
            found.append(
                Parameter(
                    name=name,
                    row=row,
                    hf_names=tuple(hf_name.format(layer=layer, expert=expert) for hf_name in row.hf_names),
                    hf_shapes=row.hf_shapes(arch),
                    layer=layer if "{layer}" in name and not name.startswith(TOWER_ROWS) else None,
                    expert=expert,
                    is_first_stage=name.startswith(("embedding.", TOWER_ROWS)),
                )
            )
    # Whatever comes before the layers first, then layer by layer: near to how the source files are ordered.
    order = {True: -1, False: arch.num_layers}
    return sorted(found, key=lambda p: (order[p.is_first_stage] if p.layer is None else p.layer, p.expert or -1))


def num_experts(arch: Architecture) -> int:
    """Routed experts of a layer that has them; 0 for a dense model."""
    return 0 if arch.experts is None else arch.experts.num_experts


def layout_problems(arch: Architecture, layout: Layout) -> Iterator[str]:
    """Why the model cannot be cut so."""
    for name, size in (("tp", layout.tp), ("pp", layout.pp), ("ep", layout.ep), ("etp", layout.etp)):
        if size < 1:
            yield f"--{name} must be at least 1, got {size}"
            return
    dims = ParallelDims(
        world_size=layout.ranks_per_stage * layout.pp,
        tp=layout.tp,
        pp=layout.pp,
        ep=layout.ep,
        etp=layout.etp,
        sequence_parallel=layout.tp > 1,
    )
    yield from (f"--{dimension}: {problem}" for dimension, problem in model_problems(arch, dims))


def exported_rows(parameter: Parameter, arch: Architecture) -> list[list[tuple[int, int]]]:
    """For each Hugging Face tensor the rows of the whole Megatron parameter, (first, count) in order, that make it up."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in parameter.hf_names]
    at = 0
    for run in parameter.row.runs(Shard(rank=0, size=1), arch):
        # Of a parameter that is whole, columns are whole too.
        count = run.stop - run.start if run.dim == 0 else parameter.hf_shapes[0][0]
        found[run.tensor].append((run.start, at, count))
        at += count
    return [[(first, count) for _, first, count in sorted(rows)] for rows in found]


class Cutter:
    """Finds out along which axis and how finely each row can be split."""

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch
        self._known: dict[tuple[Row, int], int | None] = {}

    def axis(self, parameter: Parameter, size: int) -> int | None:
        """The axis along which ``size`` equal slices are cut; None when that is impossible."""
        key = (parameter.row, size)
        if key not in self._known:
            self._known[key] = self._probe(parameter, size)
        return self._known[key]

    def shape(self, parameter: Parameter, shard: Shard) -> tuple[int, ...]:
        """Shape of a slice of the Megatron parameter."""
        whole, runs = parameter.hf_shapes[0], parameter.row.runs(shard, self._arch)
        dim = runs[0].dim
        extent = sum(run.stop - run.start for run in runs)
        if isinstance(parameter.row, Vocab):
            extent = parameter.row.num_rows(shard, self._arch)
        return (*whole[:dim], extent, *whole[dim + 1 :])

    def _probe(self, parameter: Parameter, size: int) -> int | None:
        if size == 1:
            return 0
        whole = self.shape(parameter, Shard(rank=0, size=1))
        try:
            part = self.shape(parameter, Shard(rank=0, size=size))
        except AssertionError:
            return None
        differing = [axis for axis, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b]
        if len(differing) != 1:
            return None
        axis = differing[0]
        fits = part[axis] * size == whole[axis] or isinstance(parameter.row, Vocab)
        return axis if fits and part[axis] else None


def cut(parameter: Parameter, ranks: int, cutter: Cutter, itemsize: int) -> list[Part]:
    """The parts of a parameter for ``ranks`` tensor-parallel ranks. ValueError when it cannot be split so."""
    size = 1
    if parameter.row.is_split:
        size = ranks
        if cutter.axis(parameter, size) is None and isinstance(parameter.row, QKV):
            # More ranks than key-value heads: Megatron shares out the rows of a head, which any cut of the whole serves.
            size = 1
        if cutter.axis(parameter, size) is None:
            raise ValueError(f"{parameter.hf_names[0]} of shape {parameter.hf_shapes[0]} does not split over {ranks} ranks")
        # Only whole rows: slices of columns lie scattered in the source.
        while parameter.num_elements * itemsize / size > PART_BYTES and cutter.axis(parameter, 2 * size) == 0:
            size *= 2
    axis = cutter.axis(parameter, size)
    assert axis is not None
    return [Part(parameter=parameter, shard=Shard(rank=rank, size=size), axis=axis) for rank in range(size)]


def rank_of(part: Part, arch: Architecture, layout: Layout) -> int:
    """The rank of the target layout that holds the part, in Megatron's order: tensor, then expert, then pipeline."""
    parameter, inside = part.parameter, 0
    if parameter.layer is not None:
        ends = itertools.accumulate(layers_per_chunk(arch.num_layers, layout.pp))
        stage = next(stage for stage, end in enumerate(ends) if parameter.layer < end)
    else:
        stage = 0 if parameter.is_first_stage else layout.pp - 1
    if parameter.row.is_split:
        inside = part.shard.rank * (layout.tp if parameter.expert is None else layout.etp) // part.shard.size
    if parameter.expert is not None:
        inside += layout.etp * (parameter.expert * layout.ep // num_experts(arch))
    return stage * layout.ranks_per_stage + inside


def file_plans(arch: Architecture, layout: Layout, itemsize: Callable[[Parameter], int]) -> list[FilePlan]:
    """The files of a checkpoint. ValueError when the layout does not fit the model."""
    problems = list(layout_problems(arch, layout))
    if problems:
        raise ValueError("; ".join(problems))
    cutter = Cutter(arch)
    by_rank: dict[int, list[Part]] = {}
    total = 0
    for parameter in parameters(arch):
        ranks = layout.tp if parameter.expert is None else layout.etp
        for part in cut(parameter, ranks, cutter, itemsize(parameter)):
            by_rank.setdefault(rank_of(part, arch, layout), []).append(part)
        total += parameter.num_elements * itemsize(parameter)
    limit = file_bytes(total)
    plans = []
    for rank, parts in sorted(by_rank.items()):
        batches = batched(parts, lambda part: part.num_elements * itemsize(part.parameter), limit)
        plans += [FilePlan(name=f"__{rank}_{i}.distcp", rank=rank, parts=batch) for i, batch in enumerate(batches)]
    return plans


def file_bytes(total: int) -> int:
    """How large a file may grow: small enough to share the work and to lose little, not so small that files abound."""
    return min(2**30, max(64 * 2**20, total // 32))


def batched[T](items: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Runs of items of at most ``limit`` bytes each, or of one item."""
    batch: list[T] = []
    size = 0
    for item in items:
        if batch and size + size_of(item) > limit:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += size_of(item)
    if batch:
        yield batch


def bytes_by_rank(plans: Sequence[FilePlan], itemsize: Callable[[Parameter], int]) -> Mapping[int, int]:
    """Bytes of weights that the plan gives each rank of the target layout."""
    found: dict[int, int] = {}
    for plan in plans:
        size = sum(part.num_elements * itemsize(part.parameter) for part in plan.parts)
        found[plan.rank] = found.get(plan.rank, 0) + size
    return found
