"""What every program on ranks shares: one world, one parallel context after another in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rlx.data.plan import plan_batch
from rlx.parallel.context import ParallelContext, build_context, connect, shut_down
from rlx.types.layout import BatchPlan, ParallelDims
from rlx.types.train_batch import TrainSample


@contextmanager
def context_of(layout: dict[str, Any], world_size: int) -> Iterator[ParallelContext]:
    """The context of one layout; its groups are forgotten afterwards, so that another can follow."""
    device = torch.device("cpu")
    context = build_context(ParallelDims(world_size=world_size, **layout), device, seed=1, timeout_s=60)
    assert context.dims.dp_rank_of(context.rank) == context.dp_rank, "rlx numbers ranks as Megatron does"
    yield context
    parallel_state.destroy_model_parallel()


def plan_of(samples: Sequence[TrainSample], max_tokens: int, context: ParallelContext) -> BatchPlan:
    """All of ``samples`` as one mini-batch, in micro-batches of at most ``max_tokens``."""
    return plan_batch(
        [len(sample) for sample in samples],
        [sample.num_loss_tokens for sample in samples],
        dims=context.dims,
        num_mini_batches=1,
        max_tokens=max_tokens,
    )


def arguments() -> dict[str, Any]:
    """What the test hands to the program."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def main(program: Callable[[dict[str, Any], int], None]) -> None:
    """Join the world, run ``program(arguments, world_size)``, leave."""
    torch.set_num_threads(1)
    arguments, world_size = json.loads(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    connect(init_method="env://", rank=int(os.environ["RANK"]), world_size=world_size, device=device, timeout_s=90)
    program(arguments, world_size)
    dist.barrier()
    shut_down()
