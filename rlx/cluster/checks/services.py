"""What a run needs beside models and data: verifier, engines, recordings, packages, a folder to write to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rlx.arch.families.registry import read_architecture
from rlx.config.schema import Config
from rlx.processes.rundir import check_place
from rlx.rollout.record import check_recording
from rlx.rollout.server_args import server_args


def engine_problems(config: Config, num_rows: int | None) -> Iterator[str]:
    """Arguments that engines would not start with, and recordings that cannot stand in for them."""
    rollout = config.rollout
    try:
        if config.starts_engines:
            given = server_args(rollout)
            length, needed = given.get("context_length"), config.data.max_prompt_tokens + rollout.max_new_tokens
            if isinstance(length, int) and length < needed:
                yield (
                    f"rollout.server_args.context_length: {length} does not hold data.max_prompt_tokens + rollout.max_new_tokens"
                    f" = {needed}"
                )
        if rollout.replay is not None:
            arch = read_architecture(config.model.path)
            check_recording(rollout.replay, arch.check_ids, num_rows)
    except ValueError as error:
        yield str(error)


def environment_problems(config: Config) -> Iterator[str]:
    """What this machine lacks. A configuration may well be written on another one than it runs on."""
    tracker, rollout = config.tracker, config.rollout
    wanted = {
        "tracker.wandb_project": ("wandb", tracker.wandb_project is not None),
        "tracker.tensorboard": ("tensorboard", tracker.tensorboard),
        "model.layer_spec": ("transformer_engine", config.model.layer_spec == "transformer_engine"),
        "rollout.engine": ("sglang", config.starts_engines and rollout.engine == "sglang" and rollout.python is None),
    }
    for key, (package, is_wanted) in wanted.items():
        if is_wanted and find_spec(package) is None:
            yield f"{key}: needs the package {package}, which {sys.executable} does not have"


def check_places(config: Config) -> None:
    """ConfigError where the run, its weight syncs or its recordings could not be written. Leaves nothing behind."""
    check_place("run.dir", config.run.dir)
    for key, folder in _further_folders(config).items():
        check_place(key, folder)


def check_writable(config: Config) -> None:
    """Make the folders of weight syncs and recordings; ValueError when one cannot be written to."""
    for key, folder in _further_folders(config).items():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{key}: cannot write to {folder}: {error.strerror or error}") from error
        check_place(key, folder)


def _further_folders(config: Config) -> dict[str, str]:
    """Key to folder, of what is written outside the run folder."""
    if config.is_finetuning or config.rollout.replay is not None:
        return {}
    folders = {
        "sync.dir": config.sync.dir if config.transport == "disk" else None,
        "rollout.record": config.rollout.record and str(Path(config.rollout.record).parent),
    }
    return {key: folder for key, folder in folders.items() if folder is not None}
