"""Updates with the optimizer's state in host memory, on CPUs: the hybrid optimizer takes what it is given for a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.optimizer import HybridDeviceOptimizer
from torch import Tensor

from rlx.config.schema import Config
from rlx.parallel.context import ParallelContext
from rlx.parallel.offload import offload_fields
from rlx.trainer.worker import Worker
from tests.batches import part_for, train_sample
from tests.dist.programs.layouts import context_of, main, plan_of
from tests.dist.programs.updates import collect, config_of

_DEAL = HybridDeviceOptimizer._get_sub_optimizer_param_groups


def _still_on_host(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(self: Tensor) -> Tensor:
        found = method(self)
        found.on_host = getattr(self, "on_host", False)  # type: ignore[attr-defined]
        return found

    return call


def _pinned(self: Tensor) -> Tensor:
    self.on_host = True  # type: ignore[attr-defined]
    return self


@contextmanager
def two_devices() -> Iterator[None]:
    """Tensors are on a GPU, but for those that were pinned."""
    answers: dict[str, Any] = {name: _still_on_host(getattr(torch.Tensor, name)) for name in ("detach", "clone", "float")}
    answers |= {"pin_memory": _pinned, "is_cuda": property(lambda self: not getattr(self, "on_host", False))}
    own = {name: torch.Tensor.__dict__[name] for name in answers if name in torch.Tensor.__dict__}
    for name, answer in answers.items():
        setattr(torch.Tensor, name, answer)
    try:
        yield
    finally:
        for name in answers:
            if name in own:
                setattr(torch.Tensor, name, own[name])
            else:
                delattr(torch.Tensor, name)


def deal(self: HybridDeviceOptimizer, fraction: float) -> Any:
    with two_devices():
        return _DEAL(self, fraction)


def make_worker(config: Config, context: ParallelContext, *, on_host: bool) -> Worker:
    """Here, where ``optimizer.offload`` changes nothing by itself."""
    fields = {**offload_fields(offloads=on_host), "pin_cpu_grads": False}
    with patch("rlx.parallel.optimizer.offload_fields", lambda *, offloads: fields):
        return Worker(config, context)


def run_case(arguments: dict[str, Any], case: dict[str, Any], context: ParallelContext) -> dict[str, Any]:
    on_host = case["on_host"]
    config = config_of(arguments, {}, True, case["model"])
    worker = make_worker(config, context, on_host=on_host)
    optimizers = [part.optimizer for part in worker.policy.trainable._parts()]  # type: ignore[union-attr]
    assert all(isinstance(optimizer, HybridDeviceOptimizer) == on_host for optimizer in optimizers)
    folder = Path(arguments["out"]).with_suffix(f".{case['name']}")
    samples = [train_sample(**sample) for sample in arguments["samples"]]
    part = part_for(samples, plan_of(samples, arguments["max_tokens"], context), context.dp_rank)

    def update(one: Worker) -> float:
        one.load_batch(part)
        one.score_reference()
        one.score_policy()
        one.score_critic()
        one.compute_advantages(0.1)
        one.update_critic(0)
        stats = one.update_policy(0)
        assert stats is not None
        return stats.grad_norm

    sizes = [worker.memory.sizes()]
    norms = [update(worker), update(worker)]
    sizes.append(worker.memory.sizes())
    worker.save(str(folder))
    saved = collect(worker.policy, context, "weight")
    norms.append(update(worker))
    other = arguments.get("read_by", {}).get(case["name"], on_host)
    again = make_worker(config, context, on_host=other)
    again.load(str(folder))
    read = collect(again.policy, context, "weight")
    update(again)
    weights = {"saved": saved, "read": read, "after": collect(worker.policy, context, "weight")}
    return weights | {"resumed": collect(again.policy, context, "weight"), "norms": norms, "sizes": sizes}


def program(arguments: dict[str, Any], world_size: int) -> None:
    HybridDeviceOptimizer._get_sub_optimizer_param_groups = deal
    results = {}
    for name, case in arguments["cases"].items():
        with context_of({}, world_size) as context:
            results[name] = run_case(arguments, {**case, "name": name}, context)
            if context.rank == 0:
                torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
