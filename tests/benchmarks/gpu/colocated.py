"""Rank R of a co-located trainer: publications to stock SGLang servers on the trainers' own GPUs, from pause to continue.

    python -m tests.benchmarks.gpu.colocated NAME MODEL_DIR LAYOUT_JSON URL[,URL...] ENGINE_TP       (under torchrun's variables)

The servers give back all their memory before each publication and take it again in it. In the same run: one all-gather over all
ranks, and one plain copy, of as many bytes. Run by ``bench_gpu``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import expected_shapes
from rlx.config.schema import SyncConfig
from rlx.models.heads import token_head
from rlx.models.hf.companions import Companions
from rlx.parallel.context import ParallelContext, build_context, connect, shut_down
from rlx.processes.device import take_device
from rlx.sync.engine_memory import KEY_VALUES, WEIGHTS, EngineMemory, Sharing
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import PublisherTarget
from rlx.sync.transports.handover import Seats
from rlx.trainer.link import make_publisher, spread_over_stages
from rlx.trainer.rank_model import RankModel
from rlx.trainer.scoring import score_sequences
from rlx.types.layout import ParallelDims
from rlx.types.precision import BF16
from tests.benchmarks.gpu.trainer import LIMIT_S, random_model, randomise

NUM_SYNCS = 11
PIECE_BYTES = 2**30


def seconds_of(work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def plain(num_bytes: int, world_size: int) -> dict[str, float]:
    """The same bytes by one all-gather over all ranks, and by one copy on each GPU, a gibibyte at a time."""
    whole = torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cuda")
    part, other = whole[: PIECE_BYTES // world_size].clone(), torch.empty_like(whole)
    times = max(1, round(num_bytes / PIECE_BYTES))

    def gather() -> None:
        for _ in range(times):
            dist.all_gather_into_tensor(whole, part)

    def copy() -> None:
        for _ in range(times):
            other.copy_(whole)

    found = {}
    for name, work in (("all_gather_ms", gather), ("copy_ms", copy)):
        found[name] = round(min(seconds_of(work) for _ in range(3)) * 1e3 * num_bytes / PIECE_BYTES / times, 1)
    return found


def target_of(arch: Architecture, context: ParallelContext, urls: list[str], tp: int) -> PublisherTarget:
    """Engines on the ranks' GPUs in order, which give back all their memory."""
    memory = EngineMemory((KEY_VALUES, WEIGHTS))
    return PublisherTarget(
        endpoints=tuple(Endpoint(url=url, tp=tp, index=index) for index, url in enumerate(urls)),
        expected=expected_shapes(arch),
        backend="nccl",
        device=context.device,
        transport="ipc",
        seats=Seats(
            by_engine={index: list(range(index * tp, index * tp + tp)) for index in range(len(urls))},
            spread=spread_over_stages(context) if context.dims.pp > 1 else None,
            weight_bytes=2,
        ),
        sharing=Sharing(memory=memory, make_room=torch.cuda.empty_cache),
    )


def main(name: str, model_dir: Path, layout: dict[str, Any], urls: list[str], tp: int) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = take_device("cuda", int(os.environ["LOCAL_RANK"]))
    connect(init_method="env://", rank=rank, world_size=world_size, device=device, timeout_s=LIMIT_S)
    context = build_context(ParallelDims(world_size=world_size, **layout), device, seed=0, timeout_s=LIMIT_S)
    arch = read_architecture(model_dir)
    chunks = random_model(model_dir, context)
    model = RankModel(
        arch=arch, chunks=chunks, head=token_head(context, arch), context=context, companions=Companions.of(model_dir)
    )
    canary = CanarySpec(
        vocab_size=arch.vocab_size,
        seed=0,
        precision=BF16,
        score_on_trainer=lambda rows, images: score_sequences(model, rows, 8192, images),
        export=lambda: model.weights(everywhere=True),
    )
    config = SyncConfig(canary_first=1, canary_every=0, timeout_s=60)
    publisher = make_publisher(config, context, target_of(arch, context, urls, tp), canary)
    rows: list[dict[str, float]] = []
    extra = 0
    for version in range(NUM_SYNCS):
        publisher.release()
        torch.cuda.empty_cache()
        randomise(chunks, 10 * version + context.pp_rank)  # the same on every rank of a stage, whose copies must be equal
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        manifest = publisher.publish(version, model.weights(everywhere=True, room=publisher.room))
        extra = max(extra, torch.cuda.max_memory_allocated() - base if version else 0)
        row = {"ms": round(manifest.seconds * 1e3, 1)} | {k: round(v * 1e3, 1) for k, v in manifest.phase_s.items()}
        rows.append(row)
        if rank == 0:
            print(f"{name} {version}: {row} {manifest.canary or ''}", flush=True)
    num_bytes = manifest.num_bytes
    publisher.close()
    found = plain(num_bytes, world_size)
    worst = max(rows[1:], key=lambda row: row["ms"])
    gib = max(context.gather_objects(extra)) / 2**30
    if rank == 0:
        told = {
            "worst": worst,
            "best_ms": min(row["ms"] for row in rows[1:]),
            "gb": round(num_bytes / 1e9, 2),
            "extra_gib": round(gib, 2),
            **found,
        }
        told["worst / all-gather"] = round(worst["ms"] / found["all_gather_ms"], 1)
        print("RESULT", json.dumps({f"colocated/{name}": told}), flush=True)
    shut_down()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4].split(","), int(sys.argv[5]))
