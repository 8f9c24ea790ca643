"""What a rank of ``rlx score`` does once its device is settled."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from rlx.arch.architecture import Architecture
from rlx.cli.score import Asked, dims_of
from rlx.data.images.pixels import image_file
from rlx.models.build import BuildOptions
from rlx.models.hf.companions import Companions
from rlx.parallel.context import build_context, connect, shut_down
from rlx.processes.environment import RankEnvironment
from rlx.trainer.rank_model import ModelLoader
from rlx.trainer.scoring import score_sequences
from rlx.types.precision import precision_of

_TIMEOUT_S = 600.0


def score(
    args: argparse.Namespace,
    arch: Architecture,
    asked: Asked,
    where: RankEnvironment,
    device: torch.device,
) -> list[list[float]] | None:
    """Join the world, build this rank's part, score. The rows, on rank 0; None elsewhere."""
    connect(init_method="env://", rank=where.rank, world_size=where.world_size, device=device, timeout_s=_TIMEOUT_S)
    context = build_context(dims_of(args, arch), device, seed=0, timeout_s=_TIMEOUT_S)
    options = BuildOptions(precision=precision_of(args.dtype), images=partial(image_file, args.images))
    model = ModelLoader(options, Companions.of(args.model), context).load(args.model)
    rows = score_sequences(model, asked.sequences, args.max_tokens, asked.images)
    shut_down()
    return rows if where.rank == 0 else None
