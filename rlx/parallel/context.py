"""The ranks' groups and coordinates: the one file that touches Megatron's global parallel state.

``ParallelContext`` is made once a process and handed on as a value; nobody else asks Megatron where it is. Megatron's
own schedules still read the global state that was initialised here, so both always agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from rlx.types.layout import ParallelDims


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParallelContext:
    """Where this rank sits. ``control`` spans all ranks over gloo, for objects and errors."""

    dims: ParallelDims
    device: torch.device
    rank: int
    groups: ProcessGroupCollection
    control: ProcessGroup
    timeout_s: float

    @property
    def tp_rank(self) -> int:
        return int(self.groups.tp.rank())

    @property
    def pp_rank(self) -> int:
        return int(self.groups.pp.rank())

    @property
    def cp_rank(self) -> int:
        return int(self.groups.cp.rank())

    @property
    def dp_rank(self) -> int:
        return int(self.groups.dp.rank())

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.dims.pp - 1

    @property
    def is_sender(self) -> bool:
        """The rank of its pipeline stage that speaks for the stage's weights."""
        return self.tp_rank == 0 and self.cp_rank == 0 and self.dp_rank == 0

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.dims.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def raise_together(self, error: BaseException | None) -> None:
        """Raise on every rank if any rank failed, so that nobody waits for a rank that has given up.

        The failing rank raises its own error; the others raise RuntimeError naming it.
        """
        messages = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        first = next(((rank, text) for rank, text in enumerate(messages) if text is not None), None)
        if first is not None:
            raise RuntimeError(f"trainer rank {first[0]} failed: {first[1]}")


def connect(*, init_method: str, rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
    """Join the world: NCCL on GPUs, gloo on CPUs. Raises within ``timeout_s`` if a rank is missing."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )


def build_context(dims: ParallelDims, device: torch.device, *, seed: int, timeout_s: float) -> ParallelContext:
    """Cut the world into groups. Collective; call once, after ``connect``."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=dims.vpp if dims.vpp > 1 else None,
        context_parallel_size=dims.cp,
        expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.expert_tp,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
        create_gloo_process_groups=True,
    )
    model_parallel_cuda_manual_seed(seed)
    on_gpu = device.type == "cuda"
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if on_gpu else dist.group.WORLD
    assert control is not None
    return ParallelContext(
        dims=dims,
        device=device,
        rank=dist.get_rank(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        control=control,
        timeout_s=timeout_s,
    )


def stage_of_chunk(dims: ParallelDims, pp_rank: int, vp_stage: int) -> tuple[bool, bool]:
    """(holds the embedding, holds the output) of one virtual chunk of a stage."""
    return pp_rank == 0 and vp_stage == 0, pp_rank == dims.pp - 1 and vp_stage == dims.vpp - 1


def shut_down() -> None:
    """Leave the world; safe to call when it was never joined."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
