"""What torch puts around the bytes of a tensor, filled into the room that ``items`` leaves for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from converters.extents import write_all
from converters.items import ROOM_BYTES, Item, Position
from rlx.models.hf.folder import torch_dtype


def frame(descriptor: int, item: Item, dtype: str) -> tuple[int, int]:
    """Make the block a tensor that torch loads; where that begins in its file, and its length."""
    head, tail = _around(item.shape, dtype)
    begin = item.position - len(head)
    write_all(descriptor, memoryview(head), begin)
    write_all(descriptor, memoryview(tail), item.position + item.num_bytes)
    return begin, len(head) + item.num_bytes + len(tail)


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
    with skip_data(), _without_crc():
        torch.save(tensor, outline)  # type: ignore[arg-type]
    head, tail = (b"".join(part) for part in outline.parts)
    assert outline.skipped == tensor.nbytes and max(len(head), len(tail)) <= ROOM_BYTES, (shape, len(head), len(tail))
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
