"""One fine-tuning step by each objective on one batch, under several layouts and token budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlx.config.schema import BatchingConfig, Config, DataConfig, FinetuneConfig, ModelConfig, OptimizerConfig, ParallelConfig
from rlx.data.chat_mask import masked_tokens
from rlx.data.examples import plan_examples, to_train_batch
from rlx.data.plan import Budget, part_of
from rlx.models.classifier import score_weights
from rlx.models.hf.io import stage_weights
from rlx.parallel.context import ParallelContext
from rlx.trainer.finetune_worker import FinetuneWorker
from tests.dist.programs.layouts import context_of, main


def config_of(arguments: dict[str, Any], layout: dict[str, Any], objective: dict[str, Any], max_tokens: int) -> Config:
    return Config(
        model=ModelConfig(path=arguments["model"], reference_path=arguments["reference"]),
        data=DataConfig(train=""),
        parallel=ParallelConfig(**layout),
        finetune=FinetuneConfig(**objective),
        optimizer=OptimizerConfig(lr=2e-3, clip_grad=0.0, distributed=False),
        batching=BatchingConfig(max_tokens_per_micro_batch=max_tokens),
    )


def gradients(worker: FinetuneWorker, context: ParallelContext) -> dict[str, torch.Tensor]:
    """Every parameter's gradient under its Hugging Face name, whole, on every rank."""

    def read(parameter: torch.nn.Parameter) -> torch.Tensor:
        grad: torch.Tensor = parameter.main_grad
        return grad.detach().clone()

    chunks = worker.policy.chunks
    found = dict(stage_weights(chunks, worker.policy.arch, context, read))
    found |= {name: read(weight) for name, weight in score_weights(chunks)}
    return {name: tensor for part in context.gather_objects(found) for name, tensor in part.items()}


def run_step(config: Config, arguments: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    worker = FinetuneWorker(config, context)
    if arguments.get("export_to") and config.finetune.objective == "rm":
        worker.export(str(Path(arguments["export_to"])))
    rows = arguments["pairs"] if config.finetune.is_paired else arguments["answers"]
    examples = [tuple(masked_tokens(side["token_ids"], side["loss_mask"]) for side in row) for row in rows]
    max_tokens = config.batching.max_tokens_per_micro_batch
    plan = plan_examples(examples, dims=context.dims, budget=Budget(max_tokens=max_tokens))
    worker.load_batch(part_of(to_train_batch(examples), plan, context.dims.dp_rank_of(context.rank)))
    if worker.reference is not None:
        worker.score_reference()

    def answer(value: Any) -> Any:
        return next(found for found in context.gather_objects(value) if found is not None)

    held_out = answer(worker.validate())
    stats = answer(worker.update())
    numbers = {**stats.means, "grad_norm": stats.grad_norm, "num_micro_batches": len(worker.batch.packs(0))}
    return {"numbers": numbers, "held_out": held_out, "grads": gradients(worker, context)}


def program(arguments: dict[str, Any], world_size: int) -> None:
    results: dict[str, Any] = {}
    for name, case in arguments["layouts"].items():
        with context_of(case["layout"], world_size) as context:
            for budget in case["budgets"]:
                for label, objective in arguments["objectives"].items():
                    config = config_of(arguments, case["layout"], objective, budget)
                    results.setdefault(label, {})[f"{name}, {budget} tokens"] = run_step(config, arguments, context)
            if context.rank == 0:
                torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
