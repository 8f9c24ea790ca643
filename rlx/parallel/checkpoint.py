"""Distributed checkpoints of one trained model (torch_dist): written by all ranks, readable under another layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from rlx.parallel.optimizer import Trainable, content_metadata


def save_trainable(model: Trainable, folder: Path) -> None:
    """Write weights, optimizer and schedule into ``folder``, which must exist and be empty. Collective. OSError when it cannot be
    written."""
    with failures_named(folder, "written"):
        dist_checkpointing.save(model.sharded_state(is_loading=False), str(folder), content_metadata=content_metadata())


def load_trainable(model: Trainable, folder: Path) -> None:
    """Restore what ``save_trainable`` wrote. Collective. ValueError if it was not written by it, OSError when it cannot be
    read."""
    if not (folder / "metadata.json").is_file():
        raise ValueError(f"{folder} is not a whole checkpoint: metadata.json is missing")
    with failures_named(folder, "read"):
        loaded = dist_checkpointing.load(model.sharded_state(is_loading=True), str(folder))
    model.load_state(loaded)


@contextmanager
def failures_named(folder: Path, done: str) -> Iterator[None]:
    """torch's own exception is none that ``except Exception`` catches, and tells of every rank at length: here the first one's
    cause is an OSError. What torch's checkpoints warn of (how Megatron calls them, on how many ranks) is left unsaid."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        text = f"{type(cause).__name__}: {cause}"
        raise OSError(f"the checkpoint {folder} cannot be {done} (trainer rank {rank}: {text})") from error
