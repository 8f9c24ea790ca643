"""Distributed checkpoints of one trained model (torch_dist): written by all ranks, readable under another layout."""

from __future__ import annotations

from pathlib import Path

from megatron.core import dist_checkpointing

from rlx.parallel.optimizer import Trainable, content_metadata


def save_trainable(model: Trainable, folder: Path) -> None:
    """Write weights, optimizer and schedule into ``folder``, which must exist and be empty. Collective."""
    dist_checkpointing.save(model.sharded_state(is_loading=False), str(folder), content_metadata=content_metadata())


def load_trainable(model: Trainable, folder: Path) -> None:
    """Restore what ``save_trainable`` wrote. Collective. ValueError if it was not written by it."""
    if not (folder / "metadata.json").is_file():
        raise ValueError(f"{folder} is not a whole checkpoint: metadata.json is missing")
    model.load_state(dist_checkpointing.load(model.sharded_state(is_loading=True), str(folder)))
