"""Where in which file of a torch_dist checkpoint the blocks of tensors lie. Torch's pickles are read without running anything
that they name."""

from __future__ import annotations

import io
import math
import os
import pickle
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from converters.extents import Columns, Extent
from converters.plan import GlobalTensor, Piece, Position
from rlx.models.hf.files import itemsize

_LOCAL_HEADER_BYTES = 30  # of a zip archive; the lengths of name and extra field are its last two words
_KEPT: dict[tuple[str, str], type] = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}
_STORAGES = {"BFloat16Storage": "bfloat16", "FloatStorage": "float32", "HalfStorage": "float16"}


class Plain:
    """Stands for a value of any class: the arguments that it was made with, and its attributes. What is named and not made,
    as ``torch.bfloat16``, is a class of that ``__name__``."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.args = state


def read_plainly(stream: IO[bytes], persistent: Callable[[Any], Any] | None = None) -> Any:
    """The pickled value, made of plain Python values and ``Plain`` ones. pickle.UnpicklingError when it is none."""
    return _PlainUnpickler(stream, persistent).load()


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(stream)
        if persistent is not None:
            self.persistent_load = persistent  # type: ignore[method-assign]

    def find_class(self, module: str, name: str) -> Any:
        return _KEPT.get((module, name)) or type(name, (Plain,), {"__module__": module})


class Window(io.RawIOBase):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A stored block of the tensor ``key``: a torch-saved tensor of ``length`` bytes in ``file``, from ``position``."""

    key: str
    offset: Position
    shape: Position
    file: str
    position: int
    length: int


class StoredCheckpoint:
    """The blocks of a torch_dist folder, whoever wrote it. Safe to share by threads; close it after use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / ".metadata").is_file():
            raise ValueError(f"{folder} is not a Megatron checkpoint: .metadata is missing")
        self.tensors: dict[str, GlobalTensor] = {}
        self._chunks: dict[str, dict[int, list[Chunk]]] = {}
        try:
            self._read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / '.metadata'} cannot be read: {error!r}") from error
        self._descriptors: dict[str, int] = {}
        self._starts: dict[Chunk, int | None] = {}
        self._lock = threading.Lock()

    def chunks(self, key: str, offset: Position, shape: Position) -> list[Chunk]:
        """The chunks that have a part of the block."""
        chunks = self._chunks.get(key, {})
        # Stacked layers, one a chunk, are found by their first coordinate.
        is_layer = shape[0] == 1 and offset[0] in chunks
        near = chunks[offset[0]] if is_layer else [chunk for several in chunks.values() for chunk in several]
        return [
            chunk
            for chunk in near
            if all(max(a, b) < min(a + n, b + m) for a, n, b, m in zip(offset, shape, chunk.offset, chunk.shape, strict=True))
        ]

    def window(self, chunk: Chunk) -> Window:
        """The torch-saved tensor."""
        return Window(self._descriptor(chunk), chunk.position, chunk.length)

    def extents(self, piece: Piece) -> list[Extent] | None:
        """Where the bytes of a piece lie, in its order; None when they are not in one row of stretches (a tensor cut along
        another axis than the parameter's first)."""
        axis, found = piece.num_prepended, []
        row_bytes = math.prod(piece.shape[axis + 1 :]) * itemsize(self.tensors[piece.key].dtype)
        at, end = piece.offset[axis], piece.offset[axis] + piece.shape[axis]
        for chunk, start in self._plain_chunks(piece, axis):
            first, last = chunk.offset[axis], chunk.offset[axis] + chunk.shape[axis]
            if first > at or start is None or not _spans(chunk, piece, axis):
                return None
            stop = min(last, end)
            found.append(Extent(self._descriptor(chunk), start + (at - first) * row_bytes, (stop - at) * row_bytes))
            at = stop
        return found if at == end else None

    def columns(self, piece: Piece) -> list[Columns] | None:
        """The same for a piece that is cut along its second axis, with all rows in each chunk."""
        axis, found = piece.num_prepended + 1, []
        if axis != len(piece.shape) - 1:
            return None
        item_bytes = itemsize(self.tensors[piece.key].dtype)
        at = piece.offset[axis]
        for chunk, start in self._plain_chunks(piece, axis):
            if chunk.offset[axis] != at or start is None or not _spans(chunk, piece, axis):
                return None
            width = chunk.shape[axis] * item_bytes
            found.append(Columns(self._descriptor(chunk), start, width, width, chunk.shape[axis - 1]))
            at += chunk.shape[axis]
        return found if at == piece.offset[axis] + piece.shape[axis] else None

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _read_metadata(self) -> None:
        with (self.folder / ".metadata").open("rb") as stream:
            metadata = read_plainly(stream)
        shapes: dict[tuple[str, Position], Position] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if hasattr(entry, "chunks"):
                self.tensors[key] = GlobalTensor(shape=entry.size, dtype=entry.properties.args[0].__name__)
                shapes |= {(key, chunk.offsets): chunk.sizes for chunk in entry.chunks}
        for index, place in metadata.storage_data.items():
            if index.fqn in self.tensors:
                chunk = Chunk(
                    key=index.fqn,
                    offset=index.offset,
                    shape=shapes[index.fqn, index.offset],
                    file=place.relative_path,
                    position=place.offset,
                    length=place.length,
                )
                self._chunks.setdefault(chunk.key, {}).setdefault(chunk.offset[0] if chunk.offset else 0, []).append(chunk)

    def _plain_chunks(self, piece: Piece, axis: int) -> Iterator[tuple[Chunk, int | None]]:
        found = self.chunks(piece.key, piece.offset, piece.shape)
        for chunk in sorted(found, key=lambda chunk: chunk.offset[axis]):
            yield chunk, self._start(chunk)

    def _descriptor(self, chunk: Chunk) -> int:
        with self._lock:
            if chunk.file not in self._descriptors:
                path = self.folder / chunk.file
                if not path.is_file():
                    raise ValueError(f"{path} is missing; it holds a part of {chunk.key}")
                self._descriptors[chunk.file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[chunk.file]

    def _start(self, chunk: Chunk) -> int | None:
        """The first byte of a chunk's data in its file; None when they are not simply there, row after row. Loading the chunk
        says what is wrong."""
        if chunk not in self._starts:
            try:
                inside = _start_of_data(self.window(chunk), chunk.shape, self.tensors[chunk.key].dtype)
            except (zipfile.BadZipFile, OSError, KeyError, pickle.UnpicklingError, EOFError):
                inside = None
            self._starts[chunk] = None if inside is None else chunk.position + inside
        return self._starts[chunk]


def _spans(chunk: Chunk, piece: Piece, along: int) -> bool:
    """Whether the chunk has all of the piece but for what is cut ``along`` this axis, and nothing of other layers and experts."""
    axes = [axis for axis in range(len(piece.shape)) if axis != along]
    return all((chunk.offset[a], chunk.shape[a]) == (piece.offset[a], piece.shape[a]) for a in axes)


def _start_of_data(window: Window, shape: Position, dtype: str) -> int | None:
    """The first byte of the only data record of a torch-saved tensor; None when it is of another kind."""
    with zipfile.ZipFile(window) as archive:
        records = {record.filename.split("/", 1)[1]: record for record in archive.infolist()}
    data = [name for name in records if name.startswith("data/")]
    if len(data) != 1 or records[data[0]].compress_type != zipfile.ZIP_STORED:
        return None
    if _content(window, records["byteorder"]) != sys.byteorder.encode():
        return None
    start = _start_of_record(window, records[data[0]])
    size = records[data[0]].file_size
    tensor = read_plainly(io.BytesIO(_content(window, records["data.pkl"])), lambda storage: storage)
    return start if size == math.prod(shape) * itemsize(dtype) and _is_plain(tensor, shape, dtype) else None


def _is_plain(tensor: Any, shape: Position, dtype: str) -> bool:
    """Whether it is the tensor of this shape and type that fills its storage, in order."""
    if not isinstance(tensor, Plain) or type(tensor).__name__ != "_rebuild_tensor_v2":
        return False
    (_, storage, *_), offset, size, strides = tensor.args[:4]
    in_order = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    is_in_order = all(a == b for a, b, extent in zip(strides, in_order, shape, strict=False) if extent != 1)
    return _STORAGES.get(storage.__name__) == dtype and offset == 0 and tuple(size) == shape and is_in_order


def _content(window: Window, record: zipfile.ZipInfo) -> bytes:
    """Not by the archive's own reader, which wants the checksums that writers may leave out."""
    window.seek(_start_of_record(window, record))
    return window.read(record.file_size) or b""


def _start_of_record(window: Window, record: zipfile.ZipInfo) -> int:
    window.seek(record.header_offset)
    header = window.read(_LOCAL_HEADER_BYTES) or b""
    return record.header_offset + _LOCAL_HEADER_BYTES + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
