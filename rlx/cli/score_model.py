"""What a rank of ``rlx score`` does once its device is settled."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from rlx.arch.architecture import Architecture
from rlx.cli.score import dims_of
from rlx.models.build import BuildOptions, build_model, freeze
from rlx.models.heads import token_head
from rlx.models.megatron_io import load_weights
from rlx.parallel.context import build_context, connect, shut_down
from rlx.processes.environment import RankEnvironment
from rlx.trainer.scoring import score_sequences

_TIMEOUT_S = 600.0


def score(
    args: argparse.Namespace,
    arch: Architecture,
    sequences: Sequence[Sequence[int]],
    where: RankEnvironment,
    device: torch.device,
) -> list[list[float]] | None:
    """Join the world, build this rank's part, score. The rows, on rank 0; None elsewhere."""
    connect(init_method="env://", rank=where.rank, world_size=where.world_size, device=device, timeout_s=_TIMEOUT_S)
    context = build_context(dims_of(args, arch), device, seed=0, timeout_s=_TIMEOUT_S)
    chunks = build_model(arch, context, BuildOptions(dtype=args.dtype))
    load_weights(chunks, arch, args.model, context)
    freeze(chunks)
    rows = score_sequences(chunks, token_head(context, arch), sequences, context, args.max_tokens)
    shut_down()
    return rows if where.rank == 0 else None
