"""Files of the torch_dist format: one tensor after another, each as ``torch.save`` would have written it.

Megatron's own saver wants every tensor in memory at once. Here torch says once a shape what it puts before and after the bytes of
a tensor, which are then moved between the two.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from converters.extents import write_all
from converters.plan import Position
from rlx.models.hf.folder import torch_dtype

Write = Callable[[int, int], int]
"""``write(descriptor, position)`` writes there; the bytes written."""

_PAGE_BYTES = 4096
_SAVING = threading.Lock()  # whether torch makes checksums is a setting of the whole process


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One written block: ``offset`` and ``shape`` in the global tensor ``key``; what torch loads begins at ``position`` in its
    file and has ``length`` bytes."""

    key: str
    offset: Position
    shape: Position
    position: int
    length: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, note: Mapping[str, Any]) -> Item:
        offset, shape = tuple(note["offset"]), tuple(note["shape"])
        return cls(key=note["key"], offset=offset, shape=shape, position=note["position"], length=note["length"])


class ItemFile:
    """Appends blocks of tensors to one file. A block has all axes of the global tensor ``key``."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._end = 0
        self.items: list[Item] = []

    def add(self, block: tuple[str, Position, Position], dtype: str, write: Write, *, like: int = 0) -> None:
        """Append a block (key, offset, shape). ``like`` is a position in the file that it is copied from: pages are quicker to
        copy whole."""
        key, offset, shape = block
        head, tail = _around(shape, dtype)
        position = self._end + len(head)
        position += (like - position) % _PAGE_BYTES
        begin = position - len(head)
        write_all(self._descriptor, memoryview(head), begin)
        position += write(self._descriptor, position)
        self._end = position + write_all(self._descriptor, memoryview(tail), position)
        self.items.append(Item(key=key, offset=offset, shape=shape, position=begin, length=self._end - begin))

    def close(self) -> None:
        os.close(self._descriptor)


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


@lru_cache
def _around(shape: Position, dtype: str) -> tuple[bytes, bytes]:
    tensor, outline = torch.empty(shape, dtype=torch_dtype(dtype)), _Outline()
    with _SAVING, skip_data(), _without_crc():
        torch.save(tensor, outline)  # type: ignore[arg-type]
    head, tail = (b"".join(part) for part in outline.parts)
    assert outline.skipped == tensor.nbytes, (shape, outline.skipped)
    return head, tail


@contextmanager
def _without_crc() -> Iterator[None]:
    """Leave out the zip archive's own checksums, which no torch reader looks at and which cost as much as the writing."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
