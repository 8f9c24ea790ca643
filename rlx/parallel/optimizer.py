"""A model with gradients: Megatron's data-parallel wrapper, its (distributed) optimizer and learning-rate schedule."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, ParamKey, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import Tensor, nn

from rlx.config.schema import OptimizerConfig
from rlx.parallel.context import ParallelContext
from rlx.parallel.cpu_backend import gpu_type_names
from rlx.parallel.moments import load_moments, sharded_moments
from rlx.parallel.offload import is_offloaded, offload_fields

_make_optimizer = gpu_type_names()(get_megatron_optimizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step; ``skipped`` when Megatron refused it (not finite)."""

    grad_norm: float
    learning_rate: float
    skipped: bool


class Trainable:
    """Chunks of one model under training. ``chunks`` are the bare modules, ``wrapped`` what the schedules run."""

    def __init__(self, chunks: Sequence[nn.Module], config: OptimizerConfig, context: ParallelContext, total_steps: int) -> None:
        self.chunks = list(chunks)
        model_config: Any = self.chunks[0].config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.distributed, overlap_grad_reduce=False
        )
        # Only the first chunk's gradients could overlap with backward work of the others.
        self.wrapped = [
            DistributedDataParallel(model_config, ddp, chunk, disable_bucketing=index > 0, pg_collection=context.groups)
            for index, chunk in enumerate(self.chunks)
        ]
        offloads = config.offload and context.device.type == "cuda"  # on CPUs the states are in host memory as they are
        self.optimizer = _optimizer(self.wrapped, config, offloads=offloads)
        decay_steps = config.decay_steps or max(total_steps, config.warmup_steps + 1)
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_steps,
            lr_decay_steps=decay_steps,
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def zero_grad(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @gpu_type_names()
    def step(self) -> StepResult:
        """Clip and apply the accumulated gradients, then move the schedule on. A step that Megatron refuses does not count.

        FloatingPointError, on every rank and before any weight is changed, when they are not finite: Megatron clips them by
        their norm, which would make every weight NaN.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradients are not finite (their norm is {norm}); no weight was changed")
        rate = float(self.optimizer.param_groups[0]["lr"])
        succeeded, grad_norm, _ = self.optimizer.step()
        if succeeded:
            self.schedule.step(increment=1)
        return StepResult(grad_norm=float(grad_norm or 0.0), learning_rate=rate, skipped=not succeeded)

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """What a distributed checkpoint holds of this model: weights, Adam's moments and how many updates there were."""
        model = {
            f"chunk{index}": chunk.sharded_state_dict(metadata=content_metadata())  # type: ignore[operator]
            for index, chunk in enumerate(self.chunks)
        }
        moments = sharded_moments(self._parts(), model, is_loading=is_loading)
        return {"model": model, "moments": moments, "schedule": {"num_steps": self.schedule.num_steps}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``sharded_state`` described, as read from a checkpoint; everything else is the configuration's."""
        for index, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state["model"][f"chunk{index}"])
        num_updates = int(state["schedule"]["num_steps"])
        load_moments(self._parts(), state["moments"], num_updates)
        self.schedule.step(increment=num_updates - self.schedule.num_steps)

    def gradient_buffers(self) -> Iterator[Tensor]:
        """Megatron's gradient buffers; every gradient is a view of one."""
        for chunk in self.wrapped:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                yield buffer.grad_data

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """What the optimizer steps on and remembers: (shards of) parameters or their fp32 masters, and moments."""
        for part in self._parts():
            if part.optimizer is None:
                continue
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value))

    def moments_to_come(self) -> int:
        """Bytes of Adam's two moments that do not exist yet and will be on the device: they are made by the first step."""
        parts = [part.optimizer for part in self._parts() if part.optimizer is not None]
        stepped = [optimizer for optimizer in parts if not is_offloaded(optimizer)]
        return sum(
            2 * parameter.numel() * parameter.element_size()
            for optimizer in stepped
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter not in optimizer.state
        )

    def _parts(self) -> list[Any]:
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))


def _optimizer(wrapped: Sequence[nn.Module], config: OptimizerConfig, *, offloads: bool) -> MegatronOptimizer:
    model_config: Any = wrapped[0].config
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=model_config.bf16,
        params_dtype=model_config.params_dtype,
        use_distributed_optimizer=config.distributed,
        **offload_fields(offloads=offloads),
    )
    overrides = get_standard_config_overrides(settings)
    if config.vision_lr_scale != 1:
        scale = config.vision_lr_scale
        # Groups without any of a rank's parameters are there too: the schedule and checkpoints are the same on all stages.
        overrides[ParamKey(attr="of_vision_tower")] = ParamGroupOverride(max_lr=config.lr * scale, min_lr=config.min_lr * scale)
    # The hybrid optimizer takes leaves alone, and shards of fp32 parameters are views that Megatron does not detach.
    with torch.no_grad() if settings.optimizer_cpu_offload else nullcontext():
        optimizer: MegatronOptimizer = _make_optimizer(settings, list(wrapped), overrides)
    if settings.optimizer_cpu_offload:
        gc.collect()  # Megatron makes a hybrid optimizer of whole parameters first; its hooks keep it, and its copies, in a cycle
    return optimizer


_METADATA = {"singleton_local_shards": False}


def content_metadata() -> dict[str, Any]:
    """How the tensors are written; goes into the checkpoint beside them."""
    return dict(_METADATA)
