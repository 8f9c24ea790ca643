"""Optimizer states in host memory during training: Megatron's hybrid device optimizer with all of its parameters on the host.

On the GPU stay the weights and their gradients. The fp32 masters and Adam's moments are in host memory, where PyTorch's AdamW
steps on them; gradients travel there and new weights back, parameter by parameter, while others are worked on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import HybridDeviceOptimizer
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def offload_fields(*, offloads: bool) -> dict[str, Any]:
    """Fields of Megatron's optimizer configuration. Precision-aware: no masters on the GPU beside those of the host."""
    if not offloads:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 1.0,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    }


def is_offloaded(optimizer: object) -> bool:
    """Whether an optimizer of Megatron's keeps its states in host memory."""
    return isinstance(optimizer, HybridDeviceOptimizer)


def make_states(optimizer: HybridDeviceOptimizer) -> None:
    """Make Adam's moments where there are none yet, as the first step would."""
    for stepped in optimizer.sub_optimizers:
        for parameter in _parameters(stepped):
            state = stepped.state[parameter]
            for name in _MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
            state.setdefault("step", torch.tensor(0.0, device="cpu"))
    optimizer._sync_sub_optimizers_state_to_hdo()


def state_of(optimizer: HybridDeviceOptimizer, parameter: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The fp32 master in host memory of (a shard of) a parameter on the GPU, and its moments."""
    master: Tensor = optimizer.param_to_inner_param[parameter]
    state = optimizer.state[parameter]
    return master, {name: state[name] for name in _MOMENTS}


@torch.no_grad()
def take_weights(optimizer: HybridDeviceOptimizer, num_updates: int) -> None:
    """After a checkpoint is read: parameters that are fp32 themselves have their copies in host memory anew, and Adam has made
    ``num_updates`` steps. Masters of others are in the checkpoint."""
    for parameter, master in optimizer.param_to_inner_param.items():
        if parameter.dtype == torch.float32:
            master.copy_(parameter)
    for stepped in optimizer.sub_optimizers:
        for parameter in _parameters(stepped):
            # A tensor of its own each: Adam advances a shared one once a parameter.
            stepped.state[parameter]["step"] = torch.tensor(float(num_updates), device="cpu")
    optimizer._sync_sub_optimizers_state_to_hdo()


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
