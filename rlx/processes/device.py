"""The device that a rank works on and the threads that it has, settled before anything imports Megatron."""

from __future__ import annotations

import torch

from rlx.parallel import cpu_backend
from rlx.processes.environment import hide_gpus
from rlx.processes.threads import settle_threads


def take_device(setting: str, local_rank: int) -> torch.device:
    """``cluster.device`` resolved for this rank. A GPU is claimed; on CPUs all GPUs are hidden and the CPU backend is installed.

    ValueError when the GPU that is asked for is not there.
    """
    hide_gpus(setting)
    count = torch.cuda.device_count() if setting != "cpu" and torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and not count):
        cpu_backend.install()
        return torch.device("cpu")
    if not count:
        raise ValueError("cluster.device: cuda, but no GPU is visible")
    if local_rank >= count:
        raise ValueError(f"cluster.num_trainer_ranks: {count} GPU(s) are visible here, none is left for local rank {local_rank}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def take_threads(setting: int | None, ranks_here: int) -> None:
    """``cluster.threads_per_rank`` resolved for this rank, one of ``ranks_here`` on its machine."""
    found = settle_threads(setting, ranks_here)
    if found is not None:
        torch.set_num_threads(found)
