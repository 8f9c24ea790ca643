"""Checkpoints of a run: going on from the newest, writing the next. Rank 0's part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlx.config.schema import Config
from rlx.obs.log import logger, phase
from rlx.obs.metrics import MetricsWriter
from rlx.trainer.checkpoint import read_driver_state, whole_checkpoints, write_checkpoint
from rlx.trainer.loop import Trainer


def resume(config: Config, trainer: Trainer, load_models: Callable[[str], None], writer: MetricsWriter) -> None:
    """Go on from the newest whole checkpoint where ``run.resume`` asks for it; metrics after it are dropped."""
    found = whole_checkpoints(_folder(config)) if config.run.resume == "auto" else []
    if found:
        step, folder = found[-1]
        with phase("resume", step):
            load_models(str(folder))
            trainer.load_state(read_driver_state(folder))
        logger.info("resumed from %s", folder)
    writer.truncate_after(trainer.num_steps_done)


def save(config: Config, trainer: Trainer, save_models: Callable[[str], None]) -> None:
    """Write a checkpoint of the present step."""
    with phase("save", trainer.num_steps_done):
        write_checkpoint(_folder(config), trainer.num_steps_done, trainer.state(), save_models, config.checkpoint.keep)


def _folder(config: Config) -> Path:
    return Path(config.run.dir) / "checkpoints"
