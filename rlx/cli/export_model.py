"""What the process of ``rlx export`` does once its device is settled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rlx.config.load import load_run
from rlx.obs.log import phase
from rlx.parallel.context import build_context, connect, shut_down
from rlx.trainer.rank_model import ModelLoader
from rlx.types.layout import ParallelDims

_TIMEOUT_S = 600.0


def export(run_dir: str, checkpoint: str, out: str, device: torch.device) -> None:
    """Load the run's policy from the checkpoint, on one rank and without what training takes; write the folder."""
    config = load_run(Path(run_dir))
    connect(init_method="env://", rank=0, world_size=1, device=device, timeout_s=_TIMEOUT_S)
    context = build_context(ParallelDims(world_size=1), device, seed=0, timeout_s=_TIMEOUT_S)
    # The layers that the run's GPUs had need not be here.
    loader = ModelLoader.of(replace(config.model, layer_spec="auto"), config.data.chat_template, config.run, context)
    with phase("load model"):
        policy = loader.load(config.model.path, "score" if config.finetune.objective == "rm" else "token")
        policy.load(Path(checkpoint) / "policy")
    with phase("export"):
        policy.export(out)
    shut_down()
