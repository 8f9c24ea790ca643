"""The estimate of ``rlx check`` beside what a trainer rank really allocates in two updates with random weights.

    python -m tests.benchmarks.bench_memory [--gpus N] [--only NAME,...] [--out FILE]     # on a machine with N GPUs
    python -m tests.benchmarks.bench_memory --dry                                         # on CPUs: small shapes, no figures

For each job a line of JSON: ``estimate_gib`` (all that is counted, without the reserve for libraries), ``measured_gib`` (the
largest ``torch.cuda.max_memory_allocated`` of its ranks), their ``ratio``, the parts of the estimate, the seconds of the second
update. The ranks are rlx's own workers. Jobs of more ranks than GPUs are left out and named. Exit status 1 when a job failed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

LIMIT_S, GIB = 240.0, 2**30
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
# What makes any of the shapes small enough for a CPU.
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 515,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trainer: ``shape`` of the model, ranks, layout, and what a micro-batch holds. Samples have 2,048 tokens."""

    shape: str
    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    tokens: int = 16_384
    samples: int = 16
    has_reference: bool = False


JOBS = {
    "1.5B": Job(shape="1.5B"),
    "8B-tp2": Job(shape="8B", ranks=2, parallel={"tp": 2, "sequence_parallel": True}),
    "0.6B-full": Job(shape="0.6B", model={"recompute": "full"}, tokens=32_768, samples=32),
    "1.5B-pp2": Job(shape="1.5B", ranks=2, parallel={"pp": 2}, samples=32),
    "moe-ep2": Job(shape="30B-A3B-6", ranks=2, parallel={"ep": 2}),
    "1.5B-layers": Job(shape="1.5B", model={"recompute": "full", "recompute_layers": 14}, tokens=32_768, samples=32),
    "1.5B-reference": Job(shape="1.5B", has_reference=True),
    "8B-tp2-host": Job(shape="8B", ranks=2, parallel={"tp": 2, "sequence_parallel": True}, optimizer={"offload": True}),
}


def write_model(shape: str, folder: Path, *, dry: bool) -> Path:
    """The configuration alone; weights are drawn on the ranks."""
    from tests.benchmarks.gpu.models import _QWEN, SHAPES

    own = {"8B": SHAPES["llama-8B"], "0.6B": _QWEN3, "30B-A3B-6": SHAPES["30B-A3B-cut"] | {"num_hidden_layers": 6}}
    tree = _QWEN | (own[shape] if shape in own else SHAPES[shape])
    if dry:
        tree |= {key: value for key, value in _SMALL.items() if key in tree}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def config_of(job: Job, folder: Path, *, dry: bool) -> Any:
    """The job's configuration as ``rlx check`` sees it."""
    from rlx.config.schema import (
        AlgorithmConfig,
        BatchingConfig,
        ClusterConfig,
        Config,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        RewardConfig,
    )

    placement = "loss" if job.has_reference else "none"
    return Config(
        model=ModelConfig(path=str(folder), dtype="bf16", **job.model),
        data=DataConfig(train="none"),
        reward=RewardConfig(name="numeric"),
        algorithm=AlgorithmConfig(name="grpo", kl_placement=placement, kl_coefficient=0.1 if job.has_reference else 0.0),
        optimizer=OptimizerConfig(**job.optimizer),
        parallel=ParallelConfig(**job.parallel),
        batching=BatchingConfig(max_tokens_per_micro_batch=job.tokens // (128 if dry else 1)),
        cluster=ClusterConfig(device="cpu" if dry else "auto", num_trainer_ranks=job.ranks),
    )


def measure(job: Job, folder: Path, rank: int, port: int, *, dry: bool) -> dict[str, float]:
    """One rank: load, score, two updates."""
    from rlx.processes.device import take_device

    device = take_device("cpu" if dry else "cuda", rank)
    import torch

    from rlx.data.plan import plan_batch
    from rlx.parallel.context import build_context, connect, shut_down
    from rlx.trainer.worker import Worker
    from tests.batches import part_for, random_samples
    from tests.benchmarks.gpu.trainer import randomise

    patch("rlx.trainer.rank_model.load_weights", lambda chunks, *_: randomise(chunks, 0)).start()
    config = config_of(job, folder, dry=dry)
    connect(init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=job.ranks, device=device, timeout_s=LIMIT_S)
    context = build_context(config.parallel.dims(job.ranks), device, seed=0, timeout_s=LIMIT_S)
    worker = Worker(config, context)
    length = 2048 // (128 if dry else 1)
    samples = random_samples(worker.policy.arch.vocab_size, [length] * job.samples, prompt=length // 8)
    plan = plan_batch(
        [length] * job.samples,
        [length - length // 8] * job.samples,
        dims=context.dims,
        num_mini_batches=1,
        max_tokens=config.batching.max_tokens_per_micro_batch,
    )
    worker.load_batch(part_for(samples, plan, context.dp_rank))
    if worker.reference is not None:
        worker.score_reference()
    worker.score_policy()
    worker.compute_advantages(0.0)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        worker.update_policy(0)
        if not dry:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    found = {"seconds": round(seconds, 2), "measured_gib": 0.0, "held_gib": 0.0}
    if not dry:
        found["measured_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        found["held_gib"] = round(sum(worker.memory.sizes().values()) / GIB, 2)
    shut_down()
    return found


def run_job(name: str, folder: Path, *, dry: bool) -> dict[str, Any]:
    """Its ranks as processes of their own, with a limit; what they found beside the estimate."""
    from rlx.arch.families.registry import read_architecture
    from rlx.arch.sizes import sizes_of
    from rlx.config.memory import estimate

    job = JOBS[name]
    config = config_of(job, write_model(job.shape, folder, dry=dry), dry=dry)
    found = estimate(config, sizes_of(read_architecture(config.model.path)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"rank{rank}.log" for rank in range(job.ranks)]
    base = [sys.executable, "-m", "tests.benchmarks.bench_memory", "--job", name, "--folder", str(folder), "--port", str(port)]
    own = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1" if dry else "8"}
    children = []
    for rank, log in enumerate(logs):
        argv = [*base, "--rank", str(rank), *(["--dry"] if dry else [])]
        with log.open("w") as file:
            children.append(subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, env=os.environ | own))
    deadline, rows = time.monotonic() + LIMIT_S, []
    try:
        for child, log in zip(children, logs, strict=True):
            child.wait(max(1.0, deadline - time.monotonic()))
            lines = [line for line in log.read_text().splitlines() if line.startswith("RANK ")]
            rows += [json.loads(lines[-1].removeprefix("RANK "))] if child.returncode == 0 and lines else []
    except subprocess.TimeoutExpired:
        pass
    finally:
        for child in children:
            child.kill()
            child.wait()
    if len(rows) < job.ranks:
        tails = {log.name: log.read_text(errors="replace")[-1500:] for log in logs}
        return {"job": name, "failed": tails}
    counted, measured = found.allocated / GIB, max(row["measured_gib"] for row in rows)
    parts = {part: round(size / GIB, 2) for part, size in asdict(found).items()}
    return {
        "job": name,
        "estimate_gib": round(counted, 2),
        "measured_gib": measured,
        "ratio": round(counted / measured, 3) if measured else None,
        "update_s": max(row["seconds"] for row in rows),
        "ranks": rows,
        "parts_gib": parts,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", default=",".join(JOBS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print("RANK", json.dumps(measure(JOBS[given.job], given.folder, given.rank, given.port, dry=given.dry)), flush=True)
        return 0
    names = given.only.split(",")
    if unknown := [name for name in names if name not in JOBS]:
        parser.error(f"no jobs {', '.join(unknown)}; there are {', '.join(JOBS)}")
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            if not given.dry and JOBS[name].ranks > given.gpus:
                print(json.dumps({"job": name, "left_out": f"wants {JOBS[name].ranks} GPUs"}), flush=True)
                continue
            rows.append(run_job(name, Path(work) / name, dry=given.dry))
            print(json.dumps(rows[-1]), flush=True)
            if given.out:
                given.out.write_text(json.dumps(rows, indent=1))
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
