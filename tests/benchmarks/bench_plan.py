"""How evenly and how full micro-batches are packed, on paper: ``python -m tests.benchmarks.bench_plan [MODEL_FOLDER]``.

For answers of log-normal lengths (128 to 2,048 tokens, after prompts of 90), budgets and data-parallel sizes: how full the
micro-batches are against the budget, and by how much the time of all ranks exceeds the mean's if they wait for each other once a
mini-batch (``ranks``) or after every micro-batch (``waves``); the worst of ten seeds. Tokens alone stands beside it.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from statistics import fmean

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import AttentionCost, sizes_of
from rlx.data.plan import Budget, plan_batch
from rlx.types.layout import ParallelDims

PROMPT, SEEDS = 90, range(10)


def log_normal(num: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [PROMPT + min(2048, max(128, round(math.exp(rng.gauss(math.log(600), 0.7))))) for _ in range(num)]


def measure(lengths: Sequence[int], num_ranks: int, budget: Budget, true: AttentionCost) -> tuple[float, float, float, float]:
    """Fill, ranks, waves, seconds; work is told by ``true`` whatever the budget knows of attention."""
    began = time.perf_counter()
    plan = plan_batch(
        lengths,
        lengths,
        dims=ParallelDims(world_size=num_ranks),
        num_mini_batches=1,
        max_tokens=budget.max_tokens,
        load=budget.load_of([(length,) for length in lengths]),
    )
    seconds = time.perf_counter() - began
    (mini_batch,) = plan.mini_batches
    work = [[sum(lengths[i] + true.of(lengths[i]) for i in micro) for micro in rank] for rank in mini_batch.micro_batches]
    mean = fmean(map(sum, work))
    fill = sum(lengths) / (num_ranks * len(work[0]) * budget.max_tokens)
    return fill, max(map(sum, work)) / mean, sum(map(max, zip(*work, strict=True))) / mean, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="configs/architectures/Llama-3.1-8B")
    parser.add_argument("--samples", type=int, default=256)
    arguments = parser.parse_args()
    true = sizes_of(read_architecture(arguments.model)).attention_cost
    print("budget  ranks  fill (lowest, mean), ranks / by tokens alone, waves / by tokens alone, seconds")
    for max_tokens in (8_192, 16_384, 32_768):
        for num_ranks in (1, 2, 4, 8, 32):
            rows = []
            for seed in SEEDS:
                lengths = log_normal(arguments.samples, seed)
                found = measure(lengths, num_ranks, Budget(max_tokens=max_tokens, attention=true), true)
                rows.append((*found, *measure(lengths, num_ranks, Budget(max_tokens=max_tokens), true)))
            fill, ranks, waves, seconds, _, plain_ranks, plain_waves, _ = zip(*rows, strict=True)
            beside = [f"{max(ours):.4f} / {max(plain):.4f}" for ours, plain in ((ranks, plain_ranks), (waves, plain_waves))]
            print(f"{max_tokens:6d} {num_ranks:6d}  {min(fill):.3f} {fmean(fill):.3f}  {'  '.join(beside)}  {max(seconds):.3f}")


if __name__ == "__main__":
    main()
