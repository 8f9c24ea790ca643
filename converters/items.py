"""Files of the torch_dist format: one tensor after another, each as ``torch.save`` would have written it.

Megatron's own saver wants every tensor in memory at once. Here the bytes of a tensor are written first, with room around them
for what torch puts before and after; ``frames`` fills it in when all bytes are there. Knows no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Position = tuple[int, ...]
Write = Callable[[int, int], int]
"""``write(descriptor, position)`` writes there; the bytes written."""
ROOM_BYTES = 1024
"""Before and after the bytes of each tensor. Torch needs less, whatever the tensor; ``frames`` checks it."""

_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One written block: ``offset`` and ``shape`` in the global tensor ``key``; its bytes begin at ``position`` in its file."""

    key: str
    offset: Position
    shape: Position
    position: int
    num_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, note: Mapping[str, Any]) -> Item:
        offset, shape = tuple(note["offset"]), tuple(note["shape"])
        return cls(key=note["key"], offset=offset, shape=shape, position=note["position"], num_bytes=note["num_bytes"])


class ItemFile:
    """Appends blocks of tensors to one file. A block has all axes of the global tensor ``key``."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._end = 0
        self.items: list[Item] = []

    def add(self, key: str, offset: Position, shape: Position, write: Write, *, like: int = 0) -> None:
        """Append a block. ``like`` is a position in the file that it is copied from: pages are quicker to copy whole."""
        position = self._end + ROOM_BYTES
        position += (like - position) % _PAGE_BYTES
        size = write(self._descriptor, position)
        self.items.append(Item(key=key, offset=offset, shape=shape, position=position, num_bytes=size))
        self._end = position + size + ROOM_BYTES

    def close(self) -> None:
        """Give the file its whole length, the room after the last block included."""
        try:
            os.truncate(self._descriptor, self._end)
        finally:
            os.close(self._descriptor)
