"""What the process of ``rlx export`` does once its device is settled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rlx.config.load import load_run
from rlx.config.schema import Config, ParallelConfig
from rlx.parallel.context import build_context, connect, shut_down
from rlx.trainer.finetune_worker import FinetuneWorker
from rlx.trainer.worker import Worker
from rlx.types.layout import ParallelDims

_TIMEOUT_S = 600.0


def export(run_dir: str, checkpoint: str, out: str, device: torch.device) -> None:
    """Build the run's models on one rank, load the checkpoint, write the folder."""
    config = _to_read(load_run(Path(run_dir)))
    connect(init_method="env://", rank=0, world_size=1, device=device, timeout_s=_TIMEOUT_S)
    context = build_context(ParallelDims(world_size=1), device, seed=0, timeout_s=_TIMEOUT_S)
    worker = FinetuneWorker(config, context) if config.is_finetuning else Worker(config, context)
    worker.load(checkpoint)
    worker.export(out)
    shut_down()


def _to_read(config: Config) -> Config:
    """The run's models without what training takes, on one rank without a GPU."""
    return replace(
        config,
        evaluation=replace(config.evaluation, only=True),
        cluster=replace(config.cluster, colocated=False, device="cpu", num_trainer_ranks=1),
        model=replace(config.model, layer_spec="auto"),
        parallel=ParallelConfig(),
    )
