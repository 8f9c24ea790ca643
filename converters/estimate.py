"""A conversion on paper: shards, bytes and seconds from the configuration alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from converters.plan import Layout, bytes_by_rank, file_plans
from rlx.arch.architecture import Architecture
from rlx.models.hf.files import itemsize

_SAMPLE_BYTES = 64 * 2**20


def estimate(arch: Architecture, layout: Layout, dtype: str, out: Path) -> Iterator[str]:
    """The lines of the report. ValueError when the layout does not fit. Writes and removes a small sample beside ``out``."""
    plans = file_plans(arch, layout, lambda parameter: itemsize(dtype))
    per_rank = bytes_by_rank(plans, lambda parameter: itemsize(dtype))
    files, total = Counter(plan.rank for plan in plans), sum(per_rank.values())
    elements = total // itemsize(dtype)
    yield f"{arch.model_type}: {arch.num_layers} layers, {elements / 1e9:.2f} billion weights, {_gib(total)} as {dtype}"
    yield f"layout: tp {layout.tp}, pp {layout.pp}, ep {layout.ep}, etp {layout.etp}; {len(plans)} files"
    for rank, size in per_rank.items():
        yield f"  rank {rank}: {_gib(size)} in {files[rank]} files"
    speed = write_speed(out)
    yield f"estimated time: {2 * total / speed:.0f} s to read and write {speed / 2**20:.0f} MiB/s, as measured beside {out}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def write_speed(out: Path) -> float:
    """Bytes a second to storage, measured on a small file in the nearest folder that exists."""
    folder = out.resolve()
    while not folder.is_dir():
        folder = folder.parent
    sample = folder / f".{out.name}.sample"
    data = memoryview(bytes(2**20))
    start = time.perf_counter()
    try:
        with sample.open("wb", buffering=0) as stream:
            for _ in range(_SAMPLE_BYTES // len(data)):
                stream.write(data)
    finally:
        sample.unlink(missing_ok=True)
    return _SAMPLE_BYTES / max(time.perf_counter() - start, 1e-6)
