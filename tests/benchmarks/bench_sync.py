"""Weight sync beside what else one could do: `make bench-sync`.

On a CPU: a random model goes to the embedded engine, and to stock SGLang where RLX_SGLANG_PYTHON names its interpreter, in
every way there is; in the same run torch.distributed broadcasts as many bytes between two processes. The ways take turns, the
best of each counts, and the table has ratios, since seconds on a laptop mean little, and milliseconds by phase. With CUDA
devices it is the sync part of ``bench_gpu`` instead: broadcast with two, CUDA IPC with one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlx.config.schema import SyncConfig
from rlx.models.hf.companions import Companions
from rlx.sync.collective_phase import PublisherPlace
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import Publisher, PublisherTarget
from rlx.sync.transports.disk import SyncFolder
from rlx.sync.transports.handover import Seats
from rlx.types.precision import FP32
from rlx.types.weights import WeightManifest
from tests.ports import free_port
from tests.sglang.engines import RunningEngine, sglang_python
from tests.sglang.models import scores

MIB = 2**20
SHAPE = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
RLX = "rlx stream"
# How: transport, bytes a request, and below how many a tensor shares a buffer.
WAYS: dict[str, tuple[str, int, int]] = {
    RLX: ("stream", SyncConfig().bucket_bytes, 0),
    "rlx broadcast": ("broadcast", SyncConfig().bucket_bytes, SyncConfig().flatten_below_bytes),
    "one broadcast a tensor": ("broadcast", 1, 0),
    "serial flat 512 MiB buckets": ("broadcast", 512 * MIB, 2**40),
    "ipc": ("ipc", SyncConfig().bucket_bytes, 0),
    "shm": ("shm", SyncConfig().bucket_bytes, 0),
    "disk": ("disk", SyncConfig().bucket_bytes, 0),
}


@dataclass
class Lap:
    """One way's publisher and its best publication."""

    publisher: Publisher
    best: WeightManifest | None = None
    seconds: list[float] = field(default_factory=list)


def random_model(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(folder)
    return model


def publisher_of(engine: RunningEngine, model: LlamaForCausalLM, way: tuple[str, int, int], work: Path) -> Publisher:
    transport, bucket_bytes, flatten_below = way
    target = PublisherTarget(
        endpoints=(Endpoint(url=engine.url),),
        expected={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        backend="gloo",
        device=torch.device("cpu"),
        keys=engine.keys,
        transport=transport,
        seats=Seats(by_engine={0: [0]}),
        folder=SyncFolder(path=work / f"sync-{engine.kind}", companions=Companions.of(work / "model")),
    )
    canary = CanarySpec(
        vocab_size=SHAPE["vocab_size"],
        seed=1,
        precision=FP32,
        score_on_trainer=lambda rows, images: [scores(model, row) for row in rows],
    )
    config = SyncConfig(
        bucket_bytes=bucket_bytes, flatten_below_bytes=flatten_below, canary_first=1, canary_every=0, timeout_s=120
    )
    place = PublisherPlace(stage=0, num_stages=1, is_sender=True, is_lead=True, rank=0)
    return Publisher(place, target, config, lambda text: [text], canary)


def race(engine: RunningEngine, model: LlamaForCausalLM, work: Path, repeats: int) -> dict[str, Lap]:
    """Every way in turn, ``repeats`` times after a first one that opens groups and passes the canary."""

    def weights() -> Iterator[tuple[str, Tensor]]:
        return iter([(name, tensor.detach()) for name, tensor in model.state_dict().items()])

    laps = {name: Lap(publisher_of(engine, model, way, work)) for name, way in WAYS.items()}
    version = 0
    try:
        for attempt in range(repeats + 1):
            for lap in laps.values():
                version += 1
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.0001)
                manifest = lap.publisher.publish(version, weights())
                if attempt:
                    lap.seconds.append(manifest.seconds)
                    lap.best = manifest if lap.best is None or manifest.seconds < lap.best.seconds else lap.best
    finally:
        for lap in laps.values():
            lap.publisher.close()
    return laps


def raw_rank(rank: int, port: int, num_bytes: int, repeats: int, found: mp.SimpleQueue[float]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensor = torch.ones(num_bytes, dtype=torch.uint8)
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        dist.broadcast(tensor, src=0)
        seconds.append(time.perf_counter() - began)
    if rank == 1:
        found.put(min(seconds[1:]))
    dist.destroy_process_group()


def raw_seconds(num_bytes: int, repeats: int) -> float:
    """The best plain broadcast of one tensor of so many bytes, at the receiver."""
    found: mp.SimpleQueue[float] = mp.get_context("spawn").SimpleQueue()
    mp.spawn(raw_rank, (free_port(), num_bytes, repeats, found), nprocs=2)
    return found.get()


def rows(kind: str, laps: dict[str, Lap], raw: float) -> list[str]:
    lines = []
    ours = laps[RLX].best
    assert ours is not None
    for name, lap in laps.items():
        best = lap.best
        assert best is not None
        phases = ", ".join(f"{phase} {seconds * 1e3:.1f}" for phase, seconds in best.phase_s.items())
        times, share = best.seconds / ours.seconds, raw / best.seconds
        lines.append(f"| {kind} | {name} | {times:.2f} | {share:.0%} | {best.seconds * 1e3:.0f} | {phases} |")
    return lines


def on_cpu(repeats: int) -> list[str]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    table = ["| engine | way | time, rlx stream = 1 | of raw bandwidth | ms | ms by phase |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="rlx-bench-sync-") as name:
        work = Path(name)
        model = random_model(work / "model")
        num_bytes = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
        raw = raw_seconds(num_bytes, repeats)
        head = f"{num_bytes / MIB:.0f} MiB in {len(model.state_dict())} tensors, fp32, gloo on loopback, one sender, one engine."
        laps: dict[str, dict[str, Lap]] = {}
        for kind in ("embedded", *(["sglang"] if sglang_python() else [])):
            engine = RunningEngine(kind, work / "model", work / kind)
            try:
                laps[kind] = race(engine.wait(), model, work, repeats)
            finally:
                engine.stop()
        raw = min(raw, raw_seconds(num_bytes, repeats))
    table += [line for kind, each in laps.items() for line in rows(kind, each, raw)]
    return [head, f"A plain broadcast of as many bytes: {raw * 1e3:.0f} ms, {num_bytes / raw / 1e9:.2f} GB/s.", "", *table]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4, help="publications in each way, the best counts (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-sync"), help="where results on GPUs go (%(default)s)")
    args = parser.parse_args()
    if torch.cuda.is_available():
        gpus = min(4, torch.cuda.device_count())
        arguments = ["--out", str(args.out), "--parts", "raw,sync", "--gpus", str(gpus)]
        return subprocess.call([sys.executable, "-m", "tests.benchmarks.bench_gpu", *arguments])
    print("\n".join(on_cpu(args.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
