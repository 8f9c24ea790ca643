"""Proof of a conversion: what was written, read back through the tables' exports, against the source, bit for bit."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.blocks import Blocks
from converters.differences import Difference
from converters.export import Exporter
from converters.places import Places
from converters.plan import Parameter, parameters
from converters.storage import StoredCheckpoint
from converters.work import Advance, run_all
from rlx.arch.architecture import Architecture
from rlx.models.hf.folder import HfFolder, torch_dtype


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
    blocks = Blocks(exporter)
    differences: list[Difference] = []
    lines: list[Line] = []
    lock = threading.Lock()

    def check(parameter: Parameter, advance: Advance) -> None:
        sums = {name: hashlib.sha256() for name in parameter.hf_names}
        wrong: dict[str, str] = {}
        dtype = exporter.dtype(parameter.hf_names[0], parameter)
        try:
            for name, start, block in blocks.of(parameter):
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
