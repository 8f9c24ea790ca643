"""Times rlx's publication of a model of a given shape to a running SGLang server. Run by ``bench_gpu``.

python -m tests.benchmarks.gpu.sync SHAPE MODEL_DIR URL apart|together [WAYS]

``apart``: the server is on another GPU; ``together``: on this one.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import expected_shapes
from rlx.config.schema import SyncConfig
from rlx.models.heads import token_head
from rlx.models.hf.companions import Companions
from rlx.models.hf.io import stage_weights
from rlx.parallel.context import shut_down
from rlx.sync.collective_phase import PublisherPlace
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import Publisher, PublisherTarget
from rlx.sync.transports.disk import SyncFolder
from rlx.sync.transports.handover import Seats
from rlx.trainer.rank_model import RankModel
from rlx.trainer.scoring import score_sequences
from rlx.types.precision import BF16
from tests.benchmarks.gpu.trainer import one_rank, random_model, randomise

MIB = 2**20
ONCE = SyncConfig(canary_first=0, canary_every=0, timeout_s=60)
# Transport and settings of each way; the first publishes with a canary.
WAYS = {
    "stream": ("stream", replace(ONCE, canary_first=1)),
    "stream, 128 MiB": ("stream", replace(ONCE, bucket_bytes=128 * MIB)),
    "stream, 256 MiB": ("stream", replace(ONCE, bucket_bytes=256 * MIB)),
    "stream, 1 GiB": ("stream", replace(ONCE, bucket_bytes=1024 * MIB)),
    "broadcast": ("broadcast", ONCE),
    "broadcast, whole tensors in one request": ("broadcast", replace(ONCE, bucket_bytes=2**40, flatten_below_bytes=0)),
    "one broadcast a tensor": ("broadcast", replace(ONCE, bucket_bytes=1, flatten_below_bytes=0)),
    "serial flat 512 MiB buckets": ("broadcast", replace(ONCE, bucket_bytes=512 * MIB, flatten_below_bytes=2**40)),
    "ipc": ("ipc", replace(ONCE, canary_first=1)),
    "ipc, 1 GiB": ("ipc", replace(ONCE, bucket_bytes=1024 * MIB)),
    "disk": ("disk", ONCE),
}
# Through a folder only where asked for: tens of gigabytes take their time.
WITH_TWO = [way for way, (transport, _) in WAYS.items() if transport in ("stream", "broadcast")]
WITH_ONE = [way for way, (transport, _) in WAYS.items() if transport in ("ipc", "disk")]
LIMIT_S = 20.0  # of one way's repetitions
NUM_SYNCS = 6


def main(shape: str, model_dir: Path, url: str, ways: list[str]) -> None:
    context = one_rank()
    arch = read_architecture(model_dir)
    chunks = random_model(model_dir, context)
    model = RankModel(
        arch=arch, chunks=chunks, head=token_head(context, arch), context=context, companions=Companions.of(model_dir)
    )
    target = PublisherTarget(
        endpoints=(Endpoint(url=url),),
        expected=expected_shapes(arch),
        backend="nccl",
        device=context.device,
        seats=Seats(by_engine={0: [0]}, weight_bytes=2),
        folder=SyncFolder(path=model_dir.parent / f"{shape}-versions", companions=Companions.of(model_dir)),
    )
    place = PublisherPlace(stage=0, num_stages=1, is_sender=True, is_lead=True, rank=0)
    canary = CanarySpec(
        vocab_size=arch.vocab_size,
        seed=0,
        precision=BF16,
        score_on_trainer=lambda rows, images: score_sequences(model, rows, 8192, images),
        export=lambda: stage_weights(chunks, arch, context),
    )
    version = 0
    for way in ways:
        transport, config = WAYS[way]
        publisher = Publisher(place, replace(target, transport=transport), config, context.gather_objects, canary)
        best: dict[str, float] = {}
        torch.cuda.reset_peak_memory_stats()
        base, began = torch.cuda.memory_allocated(), time.monotonic()
        for attempt in range(NUM_SYNCS):
            if attempt > 1 and time.monotonic() - began > LIMIT_S:
                break
            version += 1
            randomise(chunks, version)
            torch.cuda.synchronize()
            manifest = publisher.publish(version, stage_weights(chunks, arch, context))
            phases = {f"ms {name}": round(seconds * 1e3, 2) for name, seconds in manifest.phase_s.items()}
            row = {"ms": round(manifest.seconds * 1e3, 2), "gb_s": round(manifest.num_bytes / manifest.seconds / 1e9, 1)}
            print(f"{shape} {way} {attempt}: {row} {phases} {manifest.canary or ''}", flush=True)
            if attempt and (not best or row["ms"] < best["ms"]):
                best = {**row, **phases, "gb": round(manifest.num_bytes / 1e9, 2)}
        best["extra_gib"] = round((torch.cuda.max_memory_allocated() - base) / 2**30, 2)
        print("RESULT", json.dumps({f"sync/{shape}/{way}": best}), flush=True)
        publisher.close()
    shut_down()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[5:] or (WITH_TWO if sys.argv[4] == "apart" else WITH_ONE))
