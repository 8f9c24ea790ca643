"""Updates with the optimizer's state in host memory beside those with all of it on the GPU: the same weights.

    python -m tests.benchmarks.gpu.host_optimizer [--shape tiny|1.5B]

One rank, bf16 and fp32: three updates each, a checkpoint after the second that is read both ways, memory put away and brought
back between updates. Exit status 1 when something differs, or when optimizer state is on the GPU. With ``--device cpu`` (after
``tests.dist.on_cpu`` was imported) the key changes nothing; that run finds errors of typing.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlx.config.schema import Config
from rlx.data.plan import plan_batch
from rlx.parallel.context import ParallelContext
from rlx.trainer.worker import Worker
from rlx.types.train_batch import BatchPart
from tests.batches import part_for, train_sample
from tests.benchmarks.gpu.models import write_config, write_weights
from tests.benchmarks.gpu.trainer import config_of, one_rank


def make_part(vocab_size: int, context: ParallelContext) -> BatchPart:
    draw, lengths = random.Random(5), [40, 73, 128, 91, 17, 60]
    samples = [
        train_sample(
            sample_id=index,
            group_id=index // 2,
            token_ids=[draw.randrange(vocab_size) for _ in range(length)],
            loss_mask=[0] * 8 + [1] * (length - 8),
            rollout_logprobs=[-7.0] * length,
            reward=float(index % 2),
            scalar_advantage=draw.uniform(-1, 1),
        )
        for index, length in enumerate(lengths)
    ]
    learnt = [length - 8 for length in lengths]
    return part_for(samples, plan_batch(lengths, learnt, dims=context.dims, num_mini_batches=1, max_tokens=256))


def update(worker: Worker, part: BatchPart) -> None:
    worker.load_batch(part)
    worker.score_policy()
    worker.compute_advantages(0.0)
    worker.update_policy(0)


def weights_of(worker: Worker) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in worker.policy.weights()}


def run_case(config: Config, context: ParallelContext, folder: Path, *, offload: bool) -> dict[str, Any]:
    config = replace(config, optimizer=replace(config.optimizer, offload=offload, lr=1e-3, weight_decay=0.01))
    worker = Worker(config, context)
    worker.memory.away = ("weights", "gradients", "optimizer")
    part, times = make_part(worker.policy.arch.vocab_size, context), []
    for step in range(3):
        if step == 2:
            worker.save(str(folder))
        began = time.perf_counter()
        update(worker, part)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(round(time.perf_counter() - began, 3))
        worker.memory.put_away()
        worker.memory.bring_back()
    found = {"weights": weights_of(worker), "sizes": worker.memory.sizes(), "update_s": times}
    for name, reads_offload in (("resumed", offload), ("resumed otherwise", not offload)):
        again = Worker(replace(config, optimizer=replace(config.optimizer, offload=reads_offload)), context)
        again.load(str(folder))
        update(again, part)
        found[name] = weights_of(again)
    return found


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    given = parser.parse_args()
    context, faults = one_rank(given.device), []
    with tempfile.TemporaryDirectory() as work:
        for dtype, tolerance in (("bf16", 2**-6), ("fp32", 1e-4)):
            model = write_config(given.shape, Path(work) / dtype / "model")
            write_weights(model, torch.bfloat16 if dtype == "bf16" else torch.float32)
            config = config_of(model)
            config = replace(config, model=replace(config.model, dtype=dtype), rollout=replace(config.rollout, dtype=dtype))
            plain, moved = (
                run_case(config, context, Path(work) / dtype / f"checkpoint-{offload}", offload=offload)
                for offload in (False, True)
            )
            differences = {
                "moved": worst(moved["weights"], plain["weights"]),
                **{f"{which} {name}": worst(one[name], plain["weights"])
                   for which, one in (("plain", plain), ("moved", moved)) for name in ("resumed", "resumed otherwise")},
            }  # fmt: skip
            row = {"dtype": dtype, "worst": differences, "sizes": [plain["sizes"], moved["sizes"]]}
            print(json.dumps(row | {"update_s": [plain["update_s"], moved["update_s"]]}), flush=True)
            faults += [f"{dtype} {name}: {value}" for name, value in differences.items() if not value <= tolerance]
            if given.device == "cuda" and moved["sizes"]["optimizer"]:
                faults.append(f"{dtype}: {moved['sizes']['optimizer']} bytes of optimizer state are on the GPU")
    print("\n".join(faults) or "the same", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
