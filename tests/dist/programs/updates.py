"""Three updates of policy and critic on one batch, under several layouts; leaves losses, gradients and weights behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlx.config.schema import (
    AlgorithmConfig,
    BatchingConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
)
from rlx.models.hf.io import stage_weights
from rlx.parallel.context import ParallelContext
from rlx.parallel.schedule import forward_backward
from rlx.trainer.rank_model import RankModel
from rlx.trainer.weighting import divisors
from rlx.trainer.worker import Worker
from tests.batches import part_for, train_sample
from tests.dist.programs.layouts import context_of, main, plan_of

EXTRA_KEYS = ("distributed", "pad", "model", "algorithm", "clip", "resume")


def config_of(
    arguments: dict[str, Any], layout: dict[str, Any], distributed: bool, model: dict[str, Any] | None = None, clip: float = 0.05
) -> Config:
    optimizer = OptimizerConfig(lr=2e-3, clip_grad=clip, distributed=distributed, weight_decay=0.01)
    return Config(
        model=ModelConfig(path=arguments["model"], reference_path=arguments["reference"], **(model or {})),
        data=DataConfig(train=""),
        reward=RewardConfig(name="exact"),
        parallel=ParallelConfig(**layout),
        algorithm=AlgorithmConfig(**arguments["algorithm"]),
        optimizer=optimizer,
        critic_optimizer=optimizer,
        batching=BatchingConfig(max_tokens_per_micro_batch=arguments["max_tokens"]),
    )


def collect(trained: RankModel, context: ParallelContext, what: str) -> dict[str, torch.Tensor]:
    """Every parameter's value or gradient under its Hugging Face name, whole, on every rank."""

    def read(parameter: torch.nn.Parameter) -> torch.Tensor:
        return (parameter.main_grad if what == "grad" else parameter).detach().clone()

    found = {}
    for name, tensor in stage_weights(trained.chunks, trained.arch, context, read):
        found[name] = tensor
    if trained.kind == "value" and context.is_last_stage:
        head = trained.chunks[-1].output_layer
        found |= {f"value_head.{name}": read(parameter) for name, parameter in head.named_parameters()}
    return {name: tensor for part in context.gather_objects(found) for name, tensor in part.items()}


def run_layout(arguments: dict[str, Any], layout: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    """``layout`` may also say ``distributed`` (optimizer), ``pad`` (micro-batches to a multiple of tokens), ``model`` and
    ``algorithm`` (more of their keys), ``clip`` (of gradients) and ``resume`` (try a checkpoint)."""
    layout = dict(layout)
    pad = layout.pop("pad", None)
    distributed, model, resume = layout.pop("distributed", False), layout.pop("model", {}), layout.pop("resume", False)
    algorithm, clip = arguments["algorithm"] | layout.pop("algorithm", {}), layout.pop("clip", 0.05)
    config = config_of(arguments | {"algorithm": algorithm}, layout, distributed, model, clip)
    config = replace(config, batching=replace(config.batching, pad_to_multiple_of=pad))
    worker = Worker(config, context)
    samples = [train_sample(**sample) for sample in arguments["samples"]]
    plan = plan_of(samples, arguments["max_tokens"], context)
    worker.load_batch(part_for(samples, plan, context.dims.dp_rank_of(context.rank)))
    scores = {}
    for call in (worker.score_reference, worker.score_policy, worker.score_critic, lambda: worker.compute_advantages(0.1)):
        scores |= next(answer for answer in context.gather_objects(call()) if answer is not None)
    result: dict[str, Any] = {"scores": scores, "steps": [], "grads": {}, "weights": {}}
    roles = {"policy": (worker.policy, worker.update_policy), "critic": (worker.critic, worker.update_critic)}
    result["forwards"] = context.gather_objects(count_forwards(worker))
    for step in range(3):
        if step == 2 and resume:
            worker.save(str(checkpoint_folder(arguments)))
        row = {}
        for role, (trained, update) in roles.items():
            stats = next(answer for answer in context.gather_objects(update(0)) if answer is not None)
            row |= {f"{role}/{name}": value for name, value in stats.means.items()} | {f"{role}/grad_norm": stats.grad_norm}
            if step == 0 and not distributed:
                result["grads"][role] = collect(trained, context, "grad")
        result["steps"].append(row)
    for role, (trained, _) in roles.items():
        result["weights"][role] = collect(trained, context, "weight")
    if resume:
        again = Worker(config, context)
        again.load(str(checkpoint_folder(arguments)))
        again.load_batch(part_for(samples, plan, context.dims.dp_rank_of(context.rank)))
        again.batch.columns = worker.batch.columns
        again.update_policy(0)
        result["resumed"] = collect(again.policy, context, "weight")
    result["poisoned"] = context.gather_objects(poisoned_update(worker))
    result["after"] = collect(worker.policy, context, "weight")
    return result


def count_forwards(worker: Worker) -> list[float]:
    """How often each layer of the policy on this rank runs forward in a pass that computes gradients, which are thrown away."""
    layers = [layer for chunk in worker.policy.chunks for layer in chunk.decoder.layers]
    counts = dict.fromkeys(range(len(layers)), 0)

    def count(number: int) -> None:
        counts[number] += 1

    hooks = [layer.register_forward_pre_hook(lambda *_, number=number: count(number)) for number, layer in enumerate(layers)]
    packs = worker.batch.packs(0)
    learning = worker.policy.learning
    assert worker.policy.trainable is not None and learning is not None
    worker.policy.trainable.zero_grad()
    whole = divisors(worker.batch, 0, learning.aggregation, learning.constant)
    chunks, head = worker.policy.trainable.wrapped, worker.policy.head
    forward_backward(chunks, packs, head, learning.loss, divisors=whole, context=worker.context)
    for hook in hooks:
        hook.remove()
    return [count / len(packs) for count in counts.values()]


def poisoned_update(worker: Worker) -> str:
    """What an update says of infinite advantages."""
    for column in (worker.batch.columns.advantages or {}).values():
        column.fill_(float("inf"))
    try:
        worker.update_policy(0)
    except FloatingPointError as error:
        return str(error)
    return ""


def checkpoint_folder(arguments: dict[str, Any]) -> Path:
    return Path(arguments["out"]).with_suffix(".checkpoint")


def program(arguments: dict[str, Any], world_size: int) -> None:
    results = {}
    for name, layout in arguments["layouts"].items():
        dims = {key: value for key, value in layout.items() if key not in EXTRA_KEYS}
        with context_of(dims, world_size) as context:
            results[name] = run_layout(arguments, layout, context)
            if context.rank == 0:
                torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
