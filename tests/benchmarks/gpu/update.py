"""Times rlx's RL update and scoring pass against plain Megatron's training step and forward pass on the same model,
tokens and optimizer. Run by ``bench_gpu``.

    python -m tests.benchmarks.gpu.update MODEL_DIR LAYER_SPEC
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlx.data.plan import plan_batch
from rlx.models.rotary import rotated_as_one
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import Divisors, forward_backward, forward_only
from rlx.trainer.worker import Worker
from rlx.types.batch import LossOutput
from tests.batches import part_for, random_samples
from tests.benchmarks.gpu.trainer import config_of, one_rank

PEAK_FLOPS = 989e12
LENGTH, NUM_SEQUENCES, TOKENS = 2048, 16, 16384
REPEATS = 5


def plain_head(chunk: nn.Module, batch: LocalBatch) -> Tensor:
    packed = rotated_as_one(chunk, batch.packed_seq_params)
    losses: Tensor = chunk(batch.tokens_1t, batch.positions_1t, None, labels=batch.labels_t[None], packed_seq_params=packed)
    return losses


def plain_loss(losses: Tensor, batch: LocalBatch) -> LossOutput:
    return LossOutput(loss=(losses.float().view(-1) * batch.loss_mask_t).sum(), stats={})


def median_ms(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(times[2:]), 1)


def main(model_dir: Path, spec: str) -> None:
    context = one_rank()
    config = config_of(model_dir, spec)
    worker = Worker(config, context)
    lengths = [LENGTH] * NUM_SEQUENCES
    samples = random_samples(worker.policy.arch.vocab_size, lengths, prompt=256)
    plan = plan_batch(lengths, [LENGTH - 256] * NUM_SEQUENCES, dims=context.dims, num_mini_batches=1, max_tokens=TOKENS)
    worker.load_batch(part_for(samples, plan))
    worker.score_policy()
    worker.compute_advantages(0.0)
    print("scored once", flush=True)
    model = worker.policy.trainable
    assert model is not None

    def plain_step() -> None:
        model.zero_grad()
        packs = worker.batch.packs(0)
        total = float(NUM_SEQUENCES * LENGTH)
        forward_backward(
            model.wrapped, packs, plain_head, plain_loss, divisors=Divisors(loss=total, loss_tokens=total), context=context
        )
        model.step()

    torch.cuda.reset_peak_memory_stats()
    found = {"update/rlx_ms": median_ms(lambda: worker.update_policy(0))}
    found["update/rlx_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    print(found, flush=True)
    found["score/rlx_ms"] = median_ms(worker.score_policy)
    for module in worker.policy.chunks:
        module.config.cross_entropy_loss_fusion = True  # type: ignore[union-attr]
        impl = "te" if spec == "transformer_engine" else "native"
        module.config.cross_entropy_fusion_impl = impl  # type: ignore[union-attr]
    torch.cuda.reset_peak_memory_stats()
    found["update/plain_ms"] = median_ms(plain_step)
    found["update/plain_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    found["score/plain_ms"] = median_ms(lambda: forward_only(model.wrapped, worker.batch.packs(0), plain_head, context))
    num_tokens = NUM_SEQUENCES * LENGTH
    arch = worker.policy.arch
    parameters = sum(p.numel() for chunk in model.chunks for p in chunk.parameters())
    flops = 6 * parameters * num_tokens + 6 * arch.num_layers * arch.num_heads * arch.head_dim * LENGTH * num_tokens
    for name in ("rlx", "plain"):
        found[f"update/{name}_mfu"] = round(flops / (found[f"update/{name}_ms"] / 1e3) / PEAK_FLOPS, 3)
        found[f"score/{name}_mfu"] = round(flops / 3 / (found[f"score/{name}_ms"] / 1e3) / PEAK_FLOPS, 3)
    found["update/ratio"] = round(found["update/rlx_ms"] / found["update/plain_ms"], 3)
    found["score/ratio"] = round(found["score/rlx_ms"] / found["score/plain_ms"], 3)
    print("RESULT", json.dumps({f"{spec}: {name}": value for name, value in found.items()}), flush=True)
    profile(lambda: worker.update_policy(0))


def profile(work: Callable[[], Any]) -> None:
    """The kernels that an update spends its time in."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    print(
        profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70)[:9000], flush=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
