"""One update by each algorithm on one batch, under several layouts and token budgets; leaves losses and gradients behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rlx.parallel.context import ParallelContext
from rlx.trainer.rank_model import RankModel
from rlx.trainer.worker import Worker
from tests.batches import part_for, train_sample
from tests.dist.programs.layouts import context_of, main, plan_of
from tests.dist.programs.updates import collect, config_of


def shift_old_logprobs(worker: Worker) -> None:
    """As if the policy had moved since: ratios off 1, some of them clipped, without a second update."""
    column = worker.batch.columns.old_logprobs
    assert column is not None
    shifted = {index: values + 0.3 * torch.sin(1.7 * torch.arange(len(values)) + index) for index, values in column.items()}
    worker.batch.columns = replace(worker.batch.columns, old_logprobs=shifted)


def run_algorithm(arguments: dict[str, Any], layout: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    worker = Worker(config_of(arguments, layout, False, {}), context)
    samples = [train_sample(**sample) for sample in arguments["samples"]]
    plan = plan_of(samples, arguments["max_tokens"], context)

    def answer(value: Any) -> Any:
        return next(found for found in context.gather_objects(value) if found is not None)

    def update(trained: RankModel, method: Any, role: str) -> dict[str, Any]:
        stats = answer(method(0))
        numbers = {f"{role}/{name}": value for name, value in stats.means.items()} | {f"{role}/grad_norm": stats.grad_norm}
        return {"numbers": numbers, "grads": {f"{role}/{k}": v for k, v in collect(trained, context, "grad").items()}}

    worker.load_batch(part_for(samples, plan, context.dims.dp_rank_of(context.rank)))
    scores = {} if worker.reference is None else answer(worker.score_reference())
    scores |= answer(worker.score_policy())
    parts = []
    if worker.algorithm.critic_first and worker.critic is not None:
        parts.append(update(worker.critic, worker.update_critic, "critic"))
    if worker.critic is not None:
        scores |= answer(worker.score_critic())
    if context.is_last_stage:
        shift_old_logprobs(worker)
    scores |= answer(worker.compute_advantages(0.1))
    parts.append(update(worker.policy, worker.update_policy, "policy"))
    if worker.critic is not None and not worker.algorithm.critic_first:
        parts.append(update(worker.critic, worker.update_critic, "critic"))
    result: dict[str, Any] = {"numbers": dict(scores), "grads": {}}
    for part in parts:
        result = {key: result[key] | part[key] for key in result}
    return result


def program(arguments: dict[str, Any], world_size: int) -> None:
    results: dict[str, Any] = {}
    for name, case in arguments["layouts"].items():
        layout, budgets = case["layout"], case["budgets"]
        with context_of(layout, world_size) as context:
            for budget in budgets:
                for label, algorithm in arguments["algorithms"].items():
                    own = arguments | {"algorithm": algorithm, "max_tokens": budget}
                    found = run_algorithm(own, layout, context)
                    results.setdefault(label, {})[f"{name}, {budget} tokens"] = found
            if context.rank == 0:
                torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
