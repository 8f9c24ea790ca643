"""Buckets in an area of memory: where each lies, and which tensors lie where in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from rlx.types.weights import TensorInfo

# Where tensors start in a bucket: at a multiple of every width.
ALIGNMENT = 16


def aligned(num_bytes: int) -> int:
    """The next place where a tensor may start."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A stretch of the area, and what lies in it: tensors and where they start."""

    offset: int
    infos: tuple[TensorInfo, ...]
    starts: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.starts[-1] + self.infos[-1].num_bytes

    def line(self) -> str:
        rows = [[info.name, info.dtype, info.shape, at] for info, at in zip(self.infos, self.starts, strict=True)]
        return json.dumps([self.offset, rows])

    @classmethod
    def read(cls, line: str) -> Bucket:
        offset, rows = json.loads(line)
        infos = tuple(TensorInfo(name=name, dtype=dtype, shape=tuple(shape)) for name, dtype, shape, _ in rows)
        return cls(offset=offset, infos=infos, starts=tuple(row[3] for row in rows))


@dataclass(slots=True)
class OpenBucket:
    """A bucket that is being filled at ``offset``, of at most ``limit`` bytes."""

    offset: int
    limit: int
    infos: list[TensorInfo] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    end: int = 0

    def place(self, num_bytes: int) -> int | None:
        """Where a tensor would start; None when it does not fit."""
        start = aligned(self.end)
        return start if start + num_bytes <= self.limit else None

    def closed(self) -> Bucket:
        return Bucket(offset=self.offset, infos=tuple(self.infos), starts=tuple(self.starts))
