"""Differences between two checkpoints, or between a checkpoint and what it should be."""

from __future__ import annotations

from dataclasses import dataclass

from converters.work import Advance, run_all
from rlx.models.hf.files import EMBEDDING, HEAD, HfFiles, row_blocks, same_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A tensor that is not what it should be, and how."""

    name: str
    what: str


def differences_of(found: HfFiles, expected: HfFiles, num_workers: int) -> list[Difference]:
    """Name by name, bit by bit. A tied output matrix that ``found`` leaves to the embedding counts as there."""
    differences = [Difference(name=name, what="is not in the reference") for name in found.files if name not in expected.files]
    both = []
    for name in expected.files:
        if name in found.files:
            both.append(name)
        elif not _is_implied(name, found, expected):
            differences.append(Difference(name=name, what="is missing"))

    def check(name: str, advance: Advance) -> None:
        a, b = found.tensor(name), expected.tensor(name)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            what = f"has shape {list(a.shape)} and {a.dtype}, expected {list(b.shape)} and {b.dtype}"
            differences.append(Difference(name=name, what=what))
            return
        for start, stop in row_blocks(a.shape, a.num_bytes):
            block = found.read_rows(name, start, stop)
            if block != expected.read_rows(name, start, stop):
                differences.append(Difference(name=name, what=f"differs in rows {start} to {stop - 1}"))
                return
            advance(len(block))

    total = sum(found.tensor(name).num_bytes for name in both)
    run_all("verifying", both, check, num_workers=num_workers, total_bytes=total)
    return sorted(differences, key=lambda difference: difference.name)


def _is_implied(name: str, found: HfFiles, expected: HfFiles) -> bool:
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    return name == HEAD and EMBEDDING in found.files and same_tensor(expected, name, found, EMBEDDING)
