"""Reads blocks of tensors out of torch_dist checkpoints, or tells where in which file they lie."""

from __future__ import annotations

import io
import math
import os
import pickle
import sys
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.serialization import skip_data

from converters.extents import Extent
from converters.items import Position
from converters.places import GlobalTensor, Piece
from rlx.models.hf_files import itemsize
from rlx.models.hf_folder import torch_dtype

torch.set_num_threads(1)  # the workers are the parallelism
_LOCAL_HEADER_BYTES = 30  # of a zip archive; the lengths of name and extra field are its last two words


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [wanted], self._start + self._at) if len(wanted) else 0
        self._at += count
        return count


class StoredCheckpoint:
    """Reads blocks of tensors out of a torch_dist folder, whoever wrote it. Safe to share by threads; close it after use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / ".metadata").is_file():
            raise ValueError(f"{folder} is not a Megatron checkpoint: .metadata is missing")
        metadata = FileSystemReader(str(folder)).read_metadata()
        self.tensors: dict[str, GlobalTensor] = {}
        self._chunks: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[key] = GlobalTensor(
                    shape=tuple(entry.size), dtype=str(entry.properties.dtype).removeprefix("torch.")
                )
                for chunk in entry.chunks:
                    # Stacked layers are found by their first coordinate.
                    self._chunks.setdefault(key, {}).setdefault(chunk.offsets[0] if chunk.offsets else 0, []).append(chunk)
        self._places: Mapping[MetadataIndex, Any] = metadata.storage_data
        self._descriptors: dict[str, int] = {}
        self._starts: dict[tuple[str, Position], int | None] = {}
        self._lock = threading.Lock()

    def read(self, key: str, offset: Position, shape: Position) -> Tensor:
        """The block of ``shape`` at ``offset``. ValueError when it is not all there."""
        tensor = self.tensors[key]
        result = torch.empty(shape, dtype=torch_dtype(tensor.dtype))
        filled = 0
        for first, chunks in self._chunks[key].items():
            if first >= offset[0] + shape[0]:
                continue
            for chunk in chunks:
                filled += self._copy(key, chunk, offset, result)
        if filled != math.prod(shape):
            raise ValueError(f"{self.folder}: {key} is not whole at {list(offset)}: {filled} of {math.prod(shape)} elements")
        return result

    def extents(self, piece: Piece) -> list[Extent] | None:
        """Where the bytes of a piece lie, in its order; None when they are not in one row of stretches (a tensor cut along
        another axis than the parameter's first)."""
        axis, found = piece.num_prepended, []
        row_bytes = math.prod(piece.shape[axis + 1 :]) * itemsize(self.tensors[piece.key].dtype)
        at, end = piece.offset[axis], piece.offset[axis] + piece.shape[axis]
        for chunk in sorted(self._chunks_of(piece), key=lambda chunk: chunk.offsets[axis]):
            first, last = chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]
            start = self._start(piece.key, chunk)
            if first > at or start is None or not _spans(chunk, piece):
                return None
            descriptor = self._descriptor(self.folder / self._place(piece.key, chunk).relative_path, piece.key)
            stop = min(last, end)
            found.append(Extent(descriptor, start + (at - first) * row_bytes, (stop - at) * row_bytes))
            at = stop
        return found if at == end else None

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _copy(self, key: str, chunk: ChunkStorageMetadata, offset: Position, result: Tensor) -> int:
        begins = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
        ends = [min(a + n, b + m) for a, n, b, m in zip(offset, result.shape, chunk.offsets, chunk.sizes, strict=True)]
        if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
            return 0
        stored = self._load(key, chunk)
        source = tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, chunk.offsets, strict=True))
        target = tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, offset, strict=True))
        result[target] = stored[source]
        return math.prod(end - begin for begin, end in zip(begins, ends, strict=True))

    def _descriptor(self, path: Path, key: str) -> int:
        with self._lock:
            if path.name not in self._descriptors:
                if not path.is_file():
                    raise ValueError(f"{path} is missing; it holds a part of {key}")
                self._descriptors[path.name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path.name]

    def _chunks_of(self, piece: Piece) -> list[ChunkStorageMetadata]:
        """The chunks that have a part of the piece."""
        chunks = self._chunks.get(piece.key, {})
        near = chunks.get(piece.offset[0], []) if piece.num_prepended else [c for several in chunks.values() for c in several]
        return [
            chunk
            for chunk in near
            if all(
                max(a, b) < min(a + n, b + m)
                for a, n, b, m in zip(piece.offset, piece.shape, chunk.offsets, chunk.sizes, strict=True)
            )
        ]

    def _place(self, key: str, chunk: ChunkStorageMetadata) -> Any:
        return self._places[MetadataIndex(key, chunk.offsets)]

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._place(key, chunk)
        path = self.folder / place.relative_path
        window: Any = _Window(self._descriptor(path, key), place.offset, place.length)
        try:
            tensor: Tensor = torch.load(window, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is broken at byte {place.offset}, in {key}: {error}") from error
        if tensor.shape != chunk.sizes:
            raise ValueError(f"{path}: a part of {key} has shape {tuple(tensor.shape)}, expected {tuple(chunk.sizes)}")
        return tensor

    def _start(self, key: str, chunk: ChunkStorageMetadata) -> int | None:
        """The first byte of a chunk in its file; None when its data are not simply there, row after row."""
        known = (key, tuple(chunk.offsets))
        if known not in self._starts:
            place = self._place(key, chunk)
            window = _Window(self._descriptor(self.folder / place.relative_path, key), place.offset, place.length)
            try:
                inside = _start_of_data(window)
            except (zipfile.BadZipFile, OSError):
                inside = None  # reading it says what is wrong
            with skip_data():
                plain = self._load(key, chunk) if inside else None
            simple = plain is not None and plain.is_contiguous() and plain.untyped_storage().nbytes() == plain.nbytes
            self._starts[known] = place.offset + inside if simple and inside else None
        return self._starts[known]


def _spans(chunk: ChunkStorageMetadata, piece: Piece) -> bool:
    """Whether the chunk has all of the piece's columns and nothing of other layers and experts."""
    axes = [axis for axis in range(len(piece.shape)) if axis != piece.num_prepended]
    return all((chunk.offsets[a], chunk.sizes[a]) == (piece.offset[a], piece.shape[a]) for a in axes)


def _start_of_data(window: _Window) -> int | None:
    """The first byte of the only data record of a torch-saved tensor; None when it is of another kind."""
    with zipfile.ZipFile(window) as archive:
        records = {record.filename.split("/", 1)[1]: record for record in archive.infolist()}
    data = [name for name in records if name.startswith("data/")]
    order = records.get("byteorder")
    if len(data) != 1 or order is None or records[data[0]].compress_type != zipfile.ZIP_STORED:
        return None
    window.seek(_start_of_record(window, order))
    # Not by the archive's own reader, which wants the checksums that writers may leave out.
    is_native = window.read(order.file_size) == sys.byteorder.encode()
    return _start_of_record(window, records[data[0]]) if is_native else None


def _start_of_record(window: _Window, record: zipfile.ZipInfo) -> int:
    window.seek(record.header_offset)
    header = window.read(_LOCAL_HEADER_BYTES)
    return record.header_offset + _LOCAL_HEADER_BYTES + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
