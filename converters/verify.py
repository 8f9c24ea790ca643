"""Proof of a conversion, bit for bit: what was written, read back through the tables' exports, against the source; and one
Hugging Face folder against another."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.export import Exporter
from converters.plan import Parameter, Places, parameters
from converters.storage import StoredCheckpoint
from converters.work import Advance, run_all
from rlx.arch.architecture import Architecture
from rlx.models.hf.files import EMBEDDING, HEAD, HfFiles, row_blocks, same_tensor
from rlx.models.hf.folder import HfFolder, torch_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A tensor that is not what it should be, and how."""

    name: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Line:
    """One line of the manifest. ``sha256`` is that of the tensor's bytes in the output."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


def compare(
    folder: Path, source: Path, arch: Architecture, places: Places, num_workers: int, total_bytes: int
) -> tuple[list[Difference], list[Line]]:
    """Re-read the checkpoint in ``folder`` and compare every tensor with ``source``, cast to the stored type."""
    stored, original = StoredCheckpoint(folder), HfFolder(source)
    exporter = Exporter(stored, arch, places, {})
    differences: list[Difference] = []
    lines: list[Line] = []
    lock = threading.Lock()

    def check(parameter: Parameter, advance: Advance) -> None:
        sums = {name: hashlib.sha256() for name in parameter.hf_names}
        wrong: dict[str, str] = {}
        dtype = exporter.dtype(parameter.hf_names[0], parameter)
        try:
            for name, start, block in exporter.blocks(parameter):
                expected = original.read(name, 0, start, start + block.shape[0]).to(torch_dtype(dtype))
                if not _same_bits(block, expected):
                    wrong.setdefault(name, _first_difference(block, expected, start))
                sums[name].update(memoryview(block.view(-1).view(torch.uint8).numpy()))
                advance(block.nbytes)
        except ValueError as error:
            wrong[parameter.hf_names[0]] = str(error)
        with lock:
            differences.extend(Difference(name=name, what=what) for name, what in wrong.items())
            for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True):
                lines.append(Line(name=name, shape=shape, dtype=dtype, sha256=sums[name].hexdigest()))

    try:
        run_all("verifying", parameters(arch), check, num_workers=num_workers, total_bytes=total_bytes)
    finally:
        stored.close()
        original.close()
    return sorted(differences, key=lambda d: d.name), sorted(lines)


def report(lines: Sequence[Line]) -> None:
    """Print the manifest."""
    for line in lines:
        print(f"{line.sha256}  {line.dtype:<8} {'x'.join(map(str, line.shape)):<16} {line.name}")


def _first_difference(found: torch.Tensor, expected: torch.Tensor, first_row: int) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"has shape {list(found.shape)} and {found.dtype}, expected {list(expected.shape)} and {expected.dtype}"
    size = found.dtype.itemsize
    unequal = (found.view(-1).view(torch.uint8) != expected.view(-1).view(torch.uint8)).view(-1, size).any(dim=1)
    first = int(unequal.nonzero()[0])
    row = first_row + first // max(1, found[0].numel())
    return (
        f"differs in {int(unequal.sum())} elements, first in row {row}: {found.view(-1)[first].item()!r}"
        f" instead of {expected.view(-1)[first].item()!r}"
    )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that tells -0 from 0 and a NaN from none, and takes equal NaNs for equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


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
