"""Times rlx's publication of a model of a given shape to a running SGLang server. Run by ``bench_gpu``.

python -m tests.benchmarks.gpu.sync SHAPE MODEL_DIR URL broadcast|ipc [MODES]

``broadcast`` wants the server on another GPU, ``ipc`` on this one.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from rlx.config.schema import SyncConfig
from rlx.models.families import read_architecture
from rlx.models.heads import token_head
from rlx.models.hf_io import expected_shapes, stage_weights
from rlx.parallel.context import shut_down
from rlx.sync.canary import CanarySpec
from rlx.sync.crew import PublisherPlace
from rlx.sync.disk import SyncFolder
from rlx.sync.group import Endpoint
from rlx.sync.publisher import Publisher, PublisherTarget
from rlx.trainer.scoring import score_sequences
from tests.benchmarks.gpu.trainer import one_rank, random_model, randomise

MIB = 2**20
MODES = {
    "default": SyncConfig(canary_first=1, canary_every=0, timeout_s=60),
    "1 GiB buckets": SyncConfig(bucket_bytes=1024 * MIB, canary_first=0, canary_every=0, timeout_s=60),
    "whole tensors, one request": SyncConfig(
        bucket_bytes=2**40, flatten_below_bytes=0, canary_first=0, canary_every=0, timeout_s=60
    ),
    "all flattened, 512 MiB, serial": SyncConfig(
        bucket_bytes=512 * MIB, flatten_below_bytes=2**40, canary_first=0, canary_every=0, timeout_s=60
    ),
}
MODES_OF = {
    "broadcast": [*MODES, "disk"],
    "ipc": ["default", "1 GiB buckets", "disk"],
}
NUM_SYNCS = 5


def main(shape: str, model_dir: Path, url: str, transport: str, modes: list[str]) -> None:
    context = one_rank()
    arch = read_architecture(model_dir)
    chunks = random_model(model_dir, context)
    target = PublisherTarget(
        endpoints=(Endpoint(url=url),),
        expected=expected_shapes(arch),
        backend="nccl",
        device=context.device,
        transport=transport,
        folder=SyncFolder(path=model_dir.parent / f"{shape}-versions", model=model_dir),
    )
    place = PublisherPlace(stage=0, num_stages=1, is_sender=True, is_lead=True, rank=0)
    canary = CanarySpec(
        vocab_size=arch.vocab_size,
        seed=0,
        dtype="bf16",
        score_on_trainer=lambda rows: score_sequences(chunks, token_head(context, arch), rows, context, 8192),
    )
    version = 0
    for mode in modes:
        reached = replace(target, transport="disk") if mode == "disk" else target
        publisher = Publisher(place, reached, MODES.get(mode, MODES["default"]), context.gather_objects, canary)
        best: dict[str, float] = {}
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        for attempt in range(NUM_SYNCS):
            version += 1
            randomise(chunks, version)
            torch.cuda.synchronize()
            manifest = publisher.publish(version, stage_weights(chunks, arch, context))
            phases = {f"ms {name}": round(seconds * 1e3, 2) for name, seconds in manifest.phase_s.items()}
            row = {"ms": round(manifest.seconds * 1e3, 2), "gb_s": round(manifest.num_bytes / manifest.seconds / 1e9, 1)}
            print(f"{shape} {mode} {attempt}: {row} {phases}", flush=True)
            if attempt and (not best or row["ms"] < best["ms"]):
                best = {**row, **phases, "gb": round(manifest.num_bytes / 1e9, 2)}
        best["extra_gib"] = round((torch.cuda.max_memory_allocated() - base) / 2**30, 2)
        print(
            "RESULT",
            json.dumps({f"sync/{shape}/{reached.transport}/{mode}": best}),
            flush=True,
        )
        publisher.close()
    shut_down()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:5], modes=sys.argv[5:] or MODES_OF[sys.argv[4]])
