"""The torch_dist format: files of torch-saved items, and one description of which item is which block of which tensor.

Written here item by item, because Megatron's own saver wants every tensor in memory at once; read back by stock
``dist_checkpointing``.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_crc32_options, set_crc32_options

Position = tuple[int, ...]
OBJECTS_FILE = "__0_objects.distcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One written block: ``offset`` and ``shape`` in the global tensor ``key``, ``position`` and ``length`` in its file."""

    key: str
    offset: Position
    shape: Position
    position: int
    length: int

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "offset": self.offset, "shape": self.shape, "position": self.position, "length": self.length}

    @classmethod
    def from_json(cls, note: Mapping[str, Any]) -> Item:
        offset, shape = tuple(note["offset"]), tuple(note["shape"])
        return cls(key=note["key"], offset=offset, shape=shape, position=note["position"], length=note["length"])


@contextmanager
def without_crc() -> Iterator[None]:
    """Leave out the zip archive's own checksums, which no torch reader looks at and which cost as much as the writing."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class ItemFile:
    """Appends tensors to one file."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb", buffering=0)
        self.items: list[Item] = []

    def add(self, key: str, offset: Position, tensor: Tensor) -> None:
        """Write ``tensor``, which has all axes of the global tensor ``key``, as its block at ``offset``."""
        position = self._stream.tell()
        torch.save(_of_its_own_storage(tensor), self._stream)
        length = self._stream.tell() - position
        self.items.append(Item(key=key, offset=offset, shape=tuple(tensor.shape), position=position, length=length))

    def close(self) -> None:
        self._stream.close()


def _of_its_own_storage(tensor: Tensor) -> Tensor:
    """The same values where torch.save, which writes whole storages, finds nothing else; without a copy if contiguous."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if not tensor.is_contiguous() or not tensor.numel():
        return tensor.clone(memory_format=torch.contiguous_format)
    raw = tensor.view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalTensor:
    """Shape and type of a stored tensor."""

    shape: Position
    dtype: torch.dtype


def write_description(
    folder: Path, tensors: Mapping[str, GlobalTensor], files: Mapping[str, Sequence[Item]], objects: Mapping[str, Any]
) -> None:
    """Write what makes item files a checkpoint: objects, ``.metadata`` and, last, ``metadata.json``."""
    described: dict[str, Any] = {
        key: TensorStorageMetadata(properties=TensorProperties(dtype=tensor.dtype), size=torch.Size(tensor.shape), chunks=[])
        for key, tensor in tensors.items()
    }
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, items in files.items():
        for item in items:
            chunks = described[item.key].chunks
            offset = torch.Size(item.offset)
            places[MetadataIndex(item.key, offset, len(chunks))] = _StorageInfo(name, item.position, item.length)
            chunks.append(ChunkStorageMetadata(offsets=offset, sizes=torch.Size(item.shape)))
    with (folder / OBJECTS_FILE).open("wb") as stream:
        for key, value in objects.items():
            position = stream.tell()
            torch.save([value], stream)  # Megatron keeps an object as the list of its shards
            described[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(OBJECTS_FILE, position, stream.tell() - position)
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(Metadata(state_dict_metadata=described, storage_data=places), stream)
    save_config(CheckpointingConfig(sharded_backend="torch_dist"), str(folder))


def common_state_key() -> str:
    """Under which Megatron looks for what is not sharded."""
    return str(ShardedObject("common_state", None, (1,), (0,)).unique_key)


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
                self.tensors[key] = GlobalTensor(shape=tuple(entry.size), dtype=entry.properties.dtype)
                for chunk in entry.chunks:
                    # Stacked layers are found by their first coordinate.
                    self._chunks.setdefault(key, {}).setdefault(chunk.offsets[0] if chunk.offsets else 0, []).append(chunk)
        self._places: Mapping[MetadataIndex, Any] = metadata.storage_data
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, key: str, offset: Position, shape: Position) -> Tensor:
        """The block of ``shape`` at ``offset``. ValueError when it is not all there."""
        tensor = self.tensors[key]
        result = torch.empty(shape, dtype=tensor.dtype)
        filled = 0
        for first, chunks in self._chunks[key].items():
            if first >= offset[0] + shape[0]:
                continue
            for chunk in chunks:
                filled += self._copy(key, chunk, offset, result)
        if filled != math.prod(shape):
            raise ValueError(f"{self.folder}: {key} is not whole at {list(offset)}: {filled} of {math.prod(shape)} elements")
        return result

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

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places[MetadataIndex(key, chunk.offsets)]
        path = self.folder / place.relative_path
        descriptor = self._descriptor(path, key)
        try:
            window: Any = _Window(descriptor, place.offset, place.length)
            tensor: Tensor = torch.load(window, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is broken at byte {place.offset}, in {key}: {error}") from error
        if tensor.shape != chunk.sizes:
            raise ValueError(f"{path}: a part of {key} has shape {tuple(tensor.shape)}, expected {tuple(chunk.sizes)}")
        return tensor
