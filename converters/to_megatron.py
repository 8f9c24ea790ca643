"""Hugging Face folder to Megatron checkpoint, part by part."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from types import ModuleType

import torch

from converters.extents import Columns, Extent, cut, put, put_columns, write_all
from converters.items import Item, ItemFile, Write
from converters.journal import Output, check_free, fingerprint
from converters.plan import (
    Cutter,
    FilePlan,
    GlobalTensor,
    Layout,
    Parameter,
    Part,
    Piece,
    Places,
    Position,
    file_plans,
    parameters,
)
from converters.source import check_tensors, described_by
from converters.verify import Difference, compare, report
from converters.work import Advance, run_all
from rlx.arch.architecture import Architecture
from rlx.arch.weights import Run
from rlx.models.hf.companions import MANIFEST, Companions
from rlx.models.hf.files import itemsize, prevailing
from rlx.models.hf.folder import HfFolder, torch_dtype
from rlx.models.hf.row_tensors import load

_FILES = "blocks as torch saves them"  # what an interrupted run must have written to be gone on with


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to convert: ``dtype`` is torch's name of a type, None keeps each tensor's own."""

    layout: Layout
    dtype: str | None
    num_workers: int
    verify: bool
    resume: bool


class ToMegatron:
    """One conversion. Construction checks everything that can be checked without reading weights (ValueError)."""

    def __init__(
        self, source: Path, companions: Companions, out: Path, options: Options, megatron: Callable[[], ModuleType]
    ) -> None:
        check_free(out)
        self._companions, self._options, self._out = companions, options, out
        self._arch: Architecture = described_by(companions.config)
        self._source = HfFolder(source)
        wanted = parameters(self._arch)
        self._left_out = check_tensors(self._source, wanted, self._arch)
        self._dtypes = {p.hf_names: self._dtype_of(p) for p in wanted}
        self._cutter = Cutter(self._arch)
        self._plans = file_plans(self._arch, options.layout, self._itemsize)
        self._megatron = megatron()
        self._skeleton = self._megatron.skeleton(self._arch)
        self._places: Places = self._skeleton.places
        self._tensors = self._global_tensors()

    def run(self) -> list[Difference]:
        """Write; with ``verify``, compare what was written before it is given its name. The differences found."""
        options = self._options
        mark = fingerprint(self._source.path, options.layout, options.dtype, self._arch, _FILES)
        with Output(self._out, mark, resume=options.resume) as output:
            items, total = self._convert(output)
            self._describe(output.folder, items)
            differences = self._verify(output.folder, total) if options.verify else []
            if not differences:
                output.finish()
        return differences

    def _convert(self, output: Output) -> tuple[Mapping[str, Sequence[Item]], int]:
        """Write what is not there yet; what all files hold, and the bytes of the whole."""
        items = {name: [Item.from_json(note) for note in notes] for name, notes in output.done.items()}
        todo = [plan for plan in self._plans if plan.name not in items]
        sizes = {plan.name: sum(self._num_bytes(part) for part in plan.parts) for plan in self._plans}

        def write(plan: FilePlan, advance: Advance) -> None:
            items[plan.name] = self._write(output.folder / plan.name, plan.parts, advance)
            output.note(plan.name, [item.as_json() for item in items[plan.name]])

        total = sum(sizes.values())
        run_all(
            "converting",
            todo,
            write,
            num_workers=self._options.num_workers,
            total_bytes=total,
            done_bytes=total - sum(sizes[plan.name] for plan in todo),
        )
        return items, total

    def _write(self, path: Path, parts: Sequence[Part], advance: Advance) -> list[Item]:
        file = ItemFile(path)
        try:
            for part in parts:
                self._write_part(file, part)
                advance(self._num_bytes(part))
        finally:
            file.close()
        return file.items

    def _write_part(self, file: ItemFile, part: Part) -> None:
        blocks = list(self._blocks(part))  # none where a slice of the vocabulary is all padding
        for (piece, offset, shape), (write, like) in zip(blocks, self._writes(part, blocks) if blocks else (), strict=True):
            file.add((piece.key, offset, shape), self._tensors[piece.key].dtype, write, like=like)

    def _blocks(self, part: Part) -> Iterator[tuple[Piece, Position, Position]]:
        """The blocks that the part fills, in its order: pieces with the offsets and shapes of the blocks in them."""
        pieces = self._places[part.parameter.hf_names]
        length = self._cutter.shape(part.parameter, part.shard)[part.axis] // len(pieces)
        # A parameter stored as several pieces (gate and up) has as many halves in each of its slices.
        for piece in pieces:
            axis = piece.num_prepended + part.axis
            start = part.shard.rank * length
            # The vocabulary is stored without padding, which depends on the layout.
            kept = min(length, piece.shape[axis] - start)
            if kept > 0:
                offset = (*piece.offset[:axis], piece.offset[axis] + start, *piece.offset[axis + 1 :])
                yield piece, offset, (*piece.shape[:axis], kept, *piece.shape[axis + 1 :])

    def _writes(self, part: Part, blocks: Sequence[tuple[Piece, Position, Position]]) -> Iterator[tuple[Write, int]]:
        """What writes each block, and where its bytes begin in the source."""
        parameter = part.parameter
        stored = [(shape, self._tensors[piece.key].dtype) for piece, _, shape in blocks]
        own = {self._source.tensor(name).dtype for name in parameter.hf_names}
        if len(own.union(dtype for _, dtype in stored)) > 1:
            yield from ((partial(_write_memory, content), 0) for content in self._cast(part, stored))
            return
        runs = [(parameter.hf_names[run.tensor], run) for run in parameter.row.runs(part.shard, self._arch)]
        if runs[0][1].dim:
            sides = [self._columns(name, run) for name, run in runs]
            yield partial(put_columns, sides), 0
            return
        extents, start = [self._rows(name, run) for name, run in runs], 0
        for shape, dtype in stored:
            size = math.prod(shape) * itemsize(dtype)
            found = list(cut(extents, start, size))
            yield partial(put, found), found[0].position
            start += size

    def _rows(self, name: str, run: Run) -> Extent:
        descriptor, position, length = self._source.locate(name)
        row = length // self._source.shape(name)[0]
        return Extent(descriptor, position + run.start * row, (run.stop - run.start) * row)

    def _columns(self, name: str, run: Run) -> Columns:
        descriptor, position, length = self._source.locate(name)
        shape = self._source.shape(name)
        step, column = length // shape[0], length // (shape[0] * shape[1])
        return Columns(descriptor, position + run.start * column, (run.stop - run.start) * column, step, shape[0])

    def _cast(self, part: Part, stored: Sequence[tuple[Position, str]]) -> Iterator[memoryview]:
        """The bytes of the blocks, of these shapes and types, that make up the part. Padding, which comes last, is left out."""
        value = load(part.parameter.row, self._source.read, part.parameter.hf_names, part.shard, self._arch)
        slices = value.chunk(len(stored)) if len(stored) > 1 else (value,)
        for (shape, dtype), slice_ in zip(stored, slices, strict=True):
            kept = slice_.narrow(part.axis, 0, shape[len(shape) - slice_.dim() + part.axis])
            yield memoryview(kept.to(torch_dtype(dtype)).contiguous().view(-1).view(torch.uint8).numpy())

    def _dtype_of(self, parameter: Parameter) -> str:
        """What a fused parameter is stored in: the narrowest type that holds all its tensors exactly."""
        own = (self._source.tensor(name).dtype for name in parameter.hf_names)
        return self._options.dtype or reduce(promoted, own)

    def _itemsize(self, parameter: Parameter) -> int:
        return itemsize(self._dtypes[parameter.hf_names])

    def _num_bytes(self, part: Part) -> int:
        return part.num_elements * self._itemsize(part.parameter)

    def _global_tensors(self) -> dict[str, GlobalTensor]:
        """The stored tensors; one that stacks parameters of several types takes a type that holds them all."""
        found: dict[str, GlobalTensor] = {}
        for names, pieces in self._places.items():
            for piece in pieces:
                before = found.get(piece.key)
                dtype = self._dtypes[names] if before is None else promoted(before.dtype, self._dtypes[names])
                found[piece.key] = GlobalTensor(shape=piece.global_shape, dtype=dtype)
        return found

    def _describe(self, folder: Path, items: Mapping[str, Sequence[Item]]) -> None:
        dtypes = self._hf_dtypes()
        self._companions.write(folder, prevailing((dtype, math.prod(self._source.shape(name))) for name, dtype in dtypes.items()))
        layout = self._options.layout
        files = {plan.name: items[plan.name] for plan in self._plans}
        self._megatron.write_description(folder, self._tensors, files, self._skeleton)
        manifest = {
            "format": 1,
            "model_type": self._arch.model_type,
            "layout": {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "etp": layout.etp},
            "left_out": sorted(self._left_out),
            "dtypes": dtypes,
            "files": {file.name: file.stat().st_size for file in sorted(folder.glob("*.distcp"))},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    def _hf_dtypes(self) -> dict[str, str]:
        """The type of each Hugging Face tensor, to be given back on the way back."""
        own = self._options.dtype
        names = (name for hf_names in self._dtypes for name in hf_names)
        return {name: own or self._source.tensor(name).dtype for name in names}

    def _verify(self, folder: Path, total: int) -> list[Difference]:
        found, rows = compare(folder, self._source.path, self._arch, self._places, self._options.num_workers, total)
        report(rows)
        return found


def promoted(a: str, b: str) -> str:
    """The narrowest of the convertible types that holds both exactly."""
    return a if a == b else "float32"


def _write_memory(content: memoryview, descriptor: int, position: int) -> int:
    return write_all(descriptor, content, position)
