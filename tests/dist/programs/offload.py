"""Three updates of policy and critic, with and without everything put away between them; leaves weights and sizes behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlx.config.schema import ClusterConfig, RolloutConfig
from rlx.parallel.context import ParallelContext
from rlx.parallel.memory import PARTS
from rlx.trainer.worker import Worker
from tests.batches import part_for, train_sample
from tests.dist.programs.layouts import context_of, main, plan_of
from tests.dist.programs.updates import collect, config_of


def held(worker: Worker) -> dict[str, int]:
    """Bytes that each part really occupies."""
    found = {}
    for part in PARTS:
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in worker.memory._tensors(part)}
        found[part] = sum(storages.values())
    return found


def run_case(arguments: dict[str, Any], case: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    config = config_of(arguments, {}, case["distributed"], case["model"])
    shares = case["offload"] != "none"
    config = replace(
        config,
        cluster=ClusterConfig(device="cpu", colocated=shares, offload=case["offload"], num_trainer_ranks=context.dims.world_size),
        rollout=RolloutConfig(num_engines=1),
    )
    worker = Worker(config, context)
    samples = [train_sample(**sample) for sample in arguments["samples"]]
    plan = plan_of(samples, arguments["max_tokens"], context)
    sizes = [worker.memory.sizes()]
    rows = []
    for step in range(3):
        worker.memory.bring_back()
        worker.load_batch(part_for(samples, plan, context.dims.dp_rank_of(context.rank)))
        worker.score_reference()
        worker.score_policy()
        worker.score_critic()
        worker.compute_advantages(0.1)
        worker.update_critic(0)
        worker.update_policy(0)
        rows.append(held(worker))
        worker.memory.put_away()
        worker.memory.put_away()
        rows.append(held(worker))
        sizes.append(worker.memory.sizes())
        if step == 1:
            worker.memory.bring_back(("weights",))
            rows.append(held(worker))
    worker.memory.bring_back()
    loaded = worker
    if case["distributed"]:  # others cannot be loaded again
        folder = Path(arguments["out"]).with_suffix(f".{arguments['number']}")
        arguments["number"] += 1
        worker.save(str(folder))
        loaded = Worker(config, context)
        loaded.load(str(folder))
        loaded.memory.put_away()
        loaded.memory.bring_back()
    return {
        "weights": [collect(each, context, "weight") for each in (worker.policy, worker.critic) if each is not None],
        "loaded": [collect(each, context, "weight") for each in (loaded.policy, loaded.critic) if each is not None],
        "held": rows,
        "sizes": sizes,
    }


def program(arguments: dict[str, Any], world_size: int) -> None:
    arguments["number"] = 0
    results = {}
    for name, case in arguments["cases"].items():
        with context_of({}, world_size) as context:
            results[name] = run_case(arguments, case, context)
            if context.rank == 0:
                torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
