"""What answers of unequal lengths cost the trainer's passes: scores and updates of log-normal lengths against equal ones.

    python -m tests.benchmarks.gpu.lengths SHAPE OUT [--tp N] [--device cpu]

Each rank is one of tensor parallelism, with sequence parallelism; random weights; the planner and the worker are those of a run.
Lengths are those of 256 answers to prompts of 88 tokens: 1,024 each, or drawn log-normal between 128 and 2,048. The figure is the
share of the equal batch's FLOP/s (attention counted) that the other one keeps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from rlx.processes.device import take_device
from rlx.processes.local_ranks import run_local_ranks, this_module
from rlx.types.layout import ParallelDims
from tests.benchmarks.gpu.models import write_config

LIMIT_S, REPEATS = 120.0, 2
PROMPT, LEAST, MOST, NUM_ANSWERS = 88, 128, 2048, 256


def lengths_of(kind: str, scale: float) -> list[int]:
    """Tokens of each sequence, the same for the same kind."""
    draw = random.Random(11)
    if kind == "equal":
        return [round((PROMPT + 1024) * scale)] * NUM_ANSWERS
    answers = [min(MOST, max(LEAST, draw.lognormvariate(math.log(700), 0.8))) for _ in range(NUM_ANSWERS)]
    return [max(2, round((PROMPT + answer) * scale)) for answer in answers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=2, help="ranks, a GPU each")
    parser.add_argument("--tokens", type=int, default=16384, help="max_tokens_per_micro_batch")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    if "RANK" in os.environ:
        return run_rank(args)
    args.out.mkdir(parents=True, exist_ok=True)
    write_config(args.shape, args.out / "model")
    return run_local_ranks(this_module("tests.benchmarks.gpu.lengths", *sys.argv[1:]), args.tp)


def seconds_of(work: Callable[[], Any], settle: Callable[[], None]) -> float:
    """The median of repeated calls after a first one; ``settle`` waits for what the device still does."""
    times = []
    for _ in range(1 + REPEATS):
        settle()
        began = time.perf_counter()
        work()
        settle()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[REPEATS // 2]


def measured(worker: Any, lengths: list[int], tp: int, settle: Callable[[], None]) -> dict[str, float]:
    """Both passes over the batch that the worker holds."""
    arch = worker.policy.arch
    parameters = tp * sum(p.numel() for chunk in worker.policy.chunks for p in chunk.parameters())
    attention = 2 * arch.num_layers * arch.num_heads * arch.head_dim
    flops = sum(2 * parameters * length + attention * length**2 for length in lengths)
    score_s, update_s = seconds_of(worker.score_policy, settle), seconds_of(lambda: worker.update_policy(0), settle)
    return {
        "tokens": sum(lengths),
        "score_s": round(score_s, 3),
        "update_s": round(update_s, 3),
        "score_tflops": round(flops / score_s / tp / 1e12, 1),
        "update_tflops": round(3 * flops / update_s / tp / 1e12, 1),
    }


def run_rank(args: argparse.Namespace) -> int:
    rank = int(os.environ["RANK"])
    device = take_device(args.device, rank)
    # Megatron is imported once the device is settled.
    import torch

    from rlx.config.schema import AlgorithmConfig, BatchingConfig, Config, DataConfig, ModelConfig, ParallelConfig, RewardConfig
    from rlx.data.plan import Budget, plan_batch
    from rlx.parallel.context import build_context, connect, shut_down
    from rlx.trainer import rank_model
    from rlx.trainer.worker import Worker
    from tests.batches import part_for, random_samples
    from tests.benchmarks.gpu.trainer import randomise

    on_gpu = device.type == "cuda"
    scale, settle = (1.0, torch.cuda.synchronize) if on_gpu else (0.03, lambda: None)
    connect(init_method="env://", rank=rank, world_size=args.tp, device=device, timeout_s=LIMIT_S)
    dims = ParallelDims(world_size=args.tp, tp=args.tp, sequence_parallel=args.tp > 1)
    context = build_context(dims, device, seed=0, timeout_s=LIMIT_S)
    config = Config(
        model=ModelConfig(path=str(args.out / "model"), dtype="bf16" if on_gpu else "fp32"),
        data=DataConfig(train="none"),
        parallel=ParallelConfig(tp=args.tp, sequence_parallel=args.tp > 1),
        reward=RewardConfig(name="numeric"),
        algorithm=AlgorithmConfig(name="grpo"),
        batching=BatchingConfig(max_tokens_per_micro_batch=args.tokens),
    )
    with mock.patch.object(rank_model, "load_weights", lambda chunks, *_: randomise(chunks, 0)):
        worker = Worker(config, context)
    arch = worker.policy.arch
    budget = Budget.of(config.model, config.parallel, config.batching)

    found: dict[str, dict[str, float]] = {}
    for kind in ("equal", "log-normal"):
        lengths = lengths_of(kind, scale)
        prompt = max(1, round(PROMPT * scale))
        samples = random_samples(arch.vocab_size, lengths, prompt, group=8)
        plan = plan_batch(
            lengths,
            [length - prompt for length in lengths],
            dims=dims,
            num_mini_batches=1,
            max_tokens=args.tokens,
            load=budget.load_of([(length,) for length in lengths]),
        )
        worker.load_batch(part_for(samples, plan))
        worker.score_policy()
        worker.compute_advantages(0.0)
        num_packs = len(plan.mini_batches[0].micro_batches)
        found[kind] = measured(worker, lengths, args.tp, settle) | {"micro_batches": num_packs}
        if rank == 0:
            print(f"{args.shape} {kind}: {found[kind]}", flush=True)
    kept = {
        f"{name} kept": round(found["log-normal"][f"{name}_tflops"] / max(1e-9, found["equal"][f"{name}_tflops"]), 3)
        for name in ("score", "update")
    }
    if rank == 0:
        print("RESULT", json.dumps({f"lengths/{args.shape} TP{args.tp}": found | {"kept": kept}}), flush=True)
    shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
