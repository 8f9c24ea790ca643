"""Files of the torch_dist format: one torch-saved tensor after another.

Written here item by item, because Megatron's own saver wants every tensor in memory at once; read back by stock
``dist_checkpointing``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from converters.extents import Extent, copy, write_all

Position = tuple[int, ...]


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
        self._note(key, offset, tuple(tensor.shape), position)

    def add_copy(self, key: str, offset: Position, like: Tensor, extents: Sequence[Extent]) -> None:
        """The same for a tensor whose bytes lie in other files; ``like`` has its shape and type, and its values do not
        matter."""
        position = self._stream.tell()
        head, tail, size = _around(like)
        assert size == sum(extent.length for extent in extents), (key, offset, size)
        descriptor, end = self._stream.fileno(), position
        end += write_all(descriptor, memoryview(head), end)
        end += copy(extents, descriptor, end)
        end += write_all(descriptor, memoryview(tail), end)
        self._stream.seek(end)
        self._note(key, offset, tuple(like.shape), position)

    def close(self) -> None:
        self._stream.close()

    def _note(self, key: str, offset: Position, shape: Position, position: int) -> None:
        length = self._stream.tell() - position
        self.items.append(Item(key=key, offset=offset, shape=shape, position=position, length=length))


class _Outline:
    """A stream that keeps what torch writes around the data of one tensor, and how much data it skips."""

    def __init__(self) -> None:
        self.parts: list[list[bytes]] = [[]]
        self.skipped = 0

    def write(self, data: Any) -> int:
        self.parts[-1].append(bytes(data))
        return len(data)

    def seek(self, offset: int, whence: int) -> None:
        assert whence == os.SEEK_CUR and len(self.parts) == 1, "torch skips the data of one tensor, forwards"
        self.skipped = offset
        self.parts.append([])

    def flush(self) -> None:
        pass


def _around(tensor: Tensor) -> tuple[bytes, bytes, int]:
    """What torch.save writes before and after the data of a contiguous tensor, and the number of bytes between."""
    outline = _Outline()
    with skip_data():
        torch.save(tensor, outline)  # type: ignore[arg-type]
    head, tail = (b"".join(part) for part in outline.parts)
    return head, tail, outline.skipped


def _of_its_own_storage(tensor: Tensor) -> Tensor:
    """The same values where torch.save, which writes whole storages, finds nothing else; without a copy if contiguous."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if not tensor.is_contiguous() or not tensor.numel():
        return tensor.clone(memory_format=torch.contiguous_format)
    raw = tensor.view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
