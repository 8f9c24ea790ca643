"""Two updates, a checkpoint, a third update; the same third update by a worker that resumes, perhaps held otherwise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from rlx.config.schema import (
    BatchingConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from rlx.data.chat_mask import masked_tokens
from rlx.data.examples import plan_examples, to_train_batch
from rlx.data.plan import Budget, part_of
from rlx.parallel.context import ParallelContext
from rlx.trainer.finetune_worker import FinetuneWorker
from rlx.types.rollout import UpdateStats
from tests.dist.programs.layouts import context_of, main


def worker_of(arguments: dict[str, Any], way: dict[str, Any], context: ParallelContext) -> FinetuneWorker:
    """``way``: ``layout``, ``dtype``, ``optimizer`` (keys of that section), ``steps`` and ``moe``."""
    config = Config(
        model=ModelConfig(path=arguments["moe" if way.get("moe") else "model"], dtype=way.get("dtype", "fp32")),
        data=DataConfig(train=""),
        parallel=ParallelConfig(**way.get("layout", {})),
        finetune=FinetuneConfig(objective="sft"),
        run=RunConfig(steps=way.get("steps", 4)),
        optimizer=OptimizerConfig(**{"lr": 2e-3, "weight_decay": 0.1, "clip_grad": 1.0} | way.get("optimizer", {})),
        batching=BatchingConfig(max_tokens_per_micro_batch=56),
    )
    return FinetuneWorker(config, context)


def update(worker: FinetuneWorker, arguments: dict[str, Any], seed: int) -> UpdateStats:
    """One update on a batch of its own."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 131, (length,), generator=draw).tolist() for length in (9, 14, 5, 11)]
    examples = [(masked_tokens(row, [0] * 3 + [1] * (len(row) - 3)),) for row in rows]
    plan = plan_examples(examples, dims=worker.context.dims, budget=Budget(max_tokens=56))
    worker.load_batch(part_of(to_train_batch(examples), plan, worker.context.dims.dp_rank_of(worker.context.rank)))
    return next(answer for answer in worker.context.gather_objects(worker.update()) if answer is not None)


def weights(worker: FinetuneWorker) -> dict[str, torch.Tensor]:
    found = {name: tensor.detach().clone() for name, tensor in worker.policy.weights()}
    return {name: tensor for part in worker.context.gather_objects(found) for name, tensor in part.items()}


def save_as_before(worker: FinetuneWorker, folder: Path) -> None:
    """A checkpoint as rlx wrote it while Megatron described the optimizer's state."""
    trainable = worker.policy.trainable
    assert trainable is not None
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    model = {f"chunk{index}": chunk.sharded_state_dict(metadata=dict(metadata)) for index, chunk in enumerate(trainable.chunks)}
    flat = {key: value for chunk in model.values() for key, value in chunk.items()}
    optimizer = trainable.optimizer.sharded_state_dict(flat, is_loading=False, metadata=dict(metadata))
    state = {"model": model, "optimizer": optimizer, "schedule": trainable.schedule.state_dict()}
    if worker.context.rank == 0:
        (folder / "policy").mkdir(parents=True)
    worker.context.barrier()
    dist_checkpointing.save(state, str(folder / "policy"), content_metadata=metadata)


def make_folder(folder: Path, context: ParallelContext) -> Path:
    if context.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    context.barrier()
    return folder


def run_case(arguments: dict[str, Any], name: str, case: dict[str, Any], world_size: int) -> dict[str, Any]:
    root, result = Path(arguments["folder"]) / name, {}
    if "save" in case:
        with context_of(case["save"].get("layout", {}), world_size) as context:
            worker = worker_of(arguments, case["save"], context)
            rates = [update(worker, arguments, seed).learning_rate for seed in (1, 2)]
            if case.get("as_before"):
                save_as_before(worker, root / "first")
            else:
                worker.save(str(make_folder(root / "first", context)))
            rates.append(update(worker, arguments, 3).learning_rate)
            result = {"rates": rates, "uninterrupted": weights(worker)}
    if "load" in case:
        with context_of(case["load"].get("layout", {}), world_size) as context:
            worker = worker_of(arguments, case["load"], context)
            worker.load(str(root / "first"))
            assert worker.policy.trainable is not None
            groups = worker.policy.trainable.optimizer.param_groups
            result["groups"] = [{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} for group in groups]
            result["resumed rate"] = update(worker, arguments, 3).learning_rate
            result["resumed"] = weights(worker)
    return result


def program(arguments: dict[str, Any], world_size: int) -> None:
    results = {name: run_case(arguments, name, case, world_size) for name, case in arguments["cases"].items()}
    if os.environ["RANK"] == "0":
        torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
