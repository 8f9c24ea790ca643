"""A rank's place without a world of ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rlx.types.layout import ParallelDims


def rank_context(dims: ParallelDims, dp_rank: int = 0) -> Any:
    """What a batch asks of a ``ParallelContext``."""
    return SimpleNamespace(dims=dims, dp_rank=dp_rank, device=torch.device("cpu"))
