"""Hugging Face folder to Megatron checkpoint, part by part."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from converters.books import Books
from converters.differences import Difference
from converters.extents import Extent, RowNumbers, cut, stretches, worth_copying
from converters.items import Item, ItemFile, without_crc
from converters.journal import Output, check_free, fingerprint
from converters.places import GlobalTensor, Piece, Places, places
from converters.plan import FilePlan, Layout, Parameter, Part, file_plans, parameters
from converters.source import Companions, check_tensors, row_blocks
from converters.work import Advance, run_all
from rlx.models.architecture import Architecture
from rlx.models.companions import MANIFEST
from rlx.models.hf_folder import HfFolder

_SHORT_BYTES = 64 * 2**10
_MAX_WASTE = 4  # how many times the bytes of a slice may be read
_BLOCK_BYTES = 2**20  # fits the processor's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to convert: ``dtype`` None keeps each tensor's own."""

    layout: Layout
    dtype: torch.dtype | None
    num_workers: int
    verify: bool
    resume: bool


class ToMegatron:
    """One conversion. Construction checks everything that can be checked without reading weights (ValueError)."""

    def __init__(self, source: Path, companions: Companions, out: Path, options: Options) -> None:
        check_free(out)
        self._companions, self._options, self._out = companions, options, out
        self._arch: Architecture = companions.architecture()
        self._source = HfFolder(source)
        wanted = parameters(self._arch)
        self._left_out = check_tensors(self._source, wanted, self._arch)
        self._dtypes = {p.hf_names: self._dtype_of(p) for p in wanted}
        self._plans = file_plans(self._arch, options.layout, self._itemsize)
        self._places: Places = places(self._arch)
        self._numbers = RowNumbers(self._arch)
        self._tensors = self._global_tensors()

    def run(self) -> list[Difference]:
        """Write; with ``verify``, compare what was written before it is given its name. The differences found."""
        options = self._options
        mark = fingerprint(self._source.path, options.layout, options.dtype, self._arch)
        with Books(self._arch) as books, Output(self._out, mark, resume=options.resume) as output:
            items, total = self._convert(output)
            books.check(self._places)
            self._describe(output.folder, items, books)
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
        with without_crc():
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
        parameter = part.parameter
        copies = self._copies(part)
        for piece, offset, like, extents in copies or ():
            file.add_copy(piece.key, offset, like, extents)
        if copies is None:
            value = parameter.row.load(self._read, parameter.hf_names, part.shard, self._arch)
            for piece, offset, block in self._blocks(part, value):
                tensor = block.to(self._tensors[piece.key].dtype)
                file.add(piece.key, offset, tensor.reshape((1,) * piece.num_prepended + tuple(block.shape)))

    def _read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The slice, as ``HfFolder.read`` gives it. Short pieces of rows are cut out of whole rows: a call each takes longer."""
        stored = self._source.tensor(name)
        is_short = dim == 1 and (stop - start) * stored.dtype.itemsize < _SHORT_BYTES
        if not is_short or (stop - start) * _MAX_WASTE < stored.shape[dim] or (start, stop) == (0, stored.shape[dim]):
            return self._source.read(name, dim, start, stop)
        result = torch.empty((stored.shape[0], stop - start), dtype=stored.dtype)
        for first, last in row_blocks(stored.shape, stored.num_bytes, _BLOCK_BYTES):
            result[first:last] = self._source.read(name, 0, first, last)[:, start:stop]
        return result

    def _blocks(self, part: Part, value: Tensor) -> Iterator[tuple[Piece, tuple[int, ...], Tensor]]:
        """The slice ``value`` of the part's parameter as it is stored: the pieces with the offsets of the blocks in them."""
        pieces = self._places[part.parameter.hf_names]
        # A parameter stored as several pieces (gate and up) has as many halves in each of its slices.
        for piece, slice_ in zip(pieces, value.chunk(len(pieces)) if len(pieces) > 1 else (value,), strict=True):
            axis = piece.num_prepended + part.axis
            start = part.shard.rank * slice_.shape[part.axis]
            # The vocabulary is stored without padding, which depends on the layout.
            length = min(slice_.shape[part.axis], piece.shape[axis] - start)
            if length > 0:
                offset = (*piece.offset[:axis], piece.offset[axis] + start, *piece.offset[axis + 1 :])
                yield piece, offset, slice_.narrow(part.axis, 0, length)

    def _copies(self, part: Part) -> list[tuple[Piece, tuple[int, ...], Tensor, list[Extent]]] | None:
        """The same without the values: a tensor alike and where its bytes lie; None where they are quicker gathered in
        memory, or only come about there."""
        parameter = part.parameter
        own = {self._source.tensor(name).dtype for name in parameter.hf_names}
        numbers = self._numbers.loaded(parameter, part.shard) if len(own) == 1 else None
        if numbers is None:
            return None
        found = []
        whole = list(self._whole(parameter.hf_names))
        for piece, offset, rows in self._blocks(part, numbers):
            if own != {self._tensors[piece.key].dtype}:
                return None
            shape = (*(1,) * piece.num_prepended, len(rows), *piece.shape[piece.num_prepended + 1 :])
            like = torch.empty(shape, dtype=self._tensors[piece.key].dtype)
            row_bytes = like.nbytes // len(rows)
            runs = [(first * row_bytes, count * row_bytes) for first, count in stretches(rows)]
            found.append((piece, offset, like, [extent for start, length in runs for extent in cut(whole, start, length)]))
        return found if worth_copying([extent for *_, extents in found for extent in extents]) else None

    def _whole(self, names: Sequence[str]) -> Iterator[Extent]:
        """The tensors end to end, with a row of nothing after each, as ``RowNumbers`` counts."""
        for name in names:
            descriptor, position, length = self._source.locate(name)
            yield Extent(descriptor, position, length)
            yield Extent(-1, 0, length // self._source.shape(name)[0])

    def _dtype_of(self, parameter: Parameter) -> torch.dtype:
        """What a fused parameter is stored in: the narrowest type that holds all its tensors exactly."""
        own = (self._source.tensor(name).dtype for name in parameter.hf_names)
        return self._options.dtype or reduce(torch.promote_types, own)

    def _itemsize(self, parameter: Parameter) -> int:
        return self._dtypes[parameter.hf_names].itemsize

    def _num_bytes(self, part: Part) -> int:
        return part.num_elements * self._itemsize(part.parameter)

    def _global_tensors(self) -> dict[str, GlobalTensor]:
        """The stored tensors; one that stacks parameters of several types takes a type that holds them all."""
        found: dict[str, GlobalTensor] = {}
        for names, pieces in self._places.items():
            for piece in pieces:
                before = found.get(piece.key)
                dtype = self._dtypes[names] if before is None else torch.promote_types(before.dtype, self._dtypes[names])
                found[piece.key] = GlobalTensor(shape=piece.global_shape, dtype=dtype)
        return found

    def _describe(self, folder: Path, items: Mapping[str, Sequence[Item]], books: Books) -> None:
        self._companions.copy_to(folder)
        layout = self._options.layout
        books.describe(folder, self._tensors, {plan.name: items[plan.name] for plan in self._plans})
        manifest = {
            "format": 1,
            "model_type": self._arch.model_type,
            "layout": {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "etp": layout.etp},
            "left_out": sorted(self._left_out),
            "dtypes": self._hf_dtypes(),
            "files": {file.name: file.stat().st_size for file in sorted(folder.glob("*.distcp"))},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    def _hf_dtypes(self) -> dict[str, str]:
        """The type of each Hugging Face tensor, to be given back on the way back."""
        own = self._options.dtype
        names = (name for hf_names in self._dtypes for name in hf_names)
        return {name: str(own or self._source.tensor(name).dtype).removeprefix("torch.") for name in names}

    def _verify(self, folder: Path, total: int) -> list[Difference]:
        verify = importlib.import_module("converters.verify")  # not on the way of a conversion that is not verified
        found: list[Difference]
        found, rows = verify.compare(folder, self._source, self._arch, self._places, self._options.num_workers, total)
        verify.report(rows)
        return found
