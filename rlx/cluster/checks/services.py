"""What a run needs beside models and data: verifier, engines, recordings, packages, a folder to write to."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from rlx.arch.families.registry import read_architecture
from rlx.config.parts import EngineSettings
from rlx.config.schema import TrackerConfig
from rlx.processes.rundir import check_place
from rlx.rollout.record import check_recording
from rlx.rollout.server_args import server_args


def engine_problems(engines: EngineSettings, max_prompt_tokens: int, num_rows: int | None) -> Iterator[str]:
    """Arguments that engines would not start with, and recordings that cannot stand in for them."""
    rollout = engines.rollout
    try:
        if engines.num_started:
            given = server_args(rollout)
            length, needed = given.get("context_length"), max_prompt_tokens + rollout.max_new_tokens
            if isinstance(length, int) and length < needed:
                yield (
                    f"rollout.server_args.context_length: {length} does not hold data.max_prompt_tokens + rollout.max_new_tokens"
                    f" = {needed}"
                )
        if rollout.replay is not None:
            arch = read_architecture(engines.model_path)
            check_recording(rollout.replay, arch.check_ids, num_rows)
    except ValueError as error:
        yield str(error)


def environment_problems(tracker: TrackerConfig, layer_spec: str, engines: EngineSettings) -> Iterator[str]:
    """What this machine lacks. A configuration may well be written on another one than it runs on."""
    starts_sglang = engines.num_started and engines.rollout.engine == "sglang"
    wanted = {
        "tracker.wandb_project": ("wandb", tracker.wandb_project is not None),
        "tracker.tensorboard": ("tensorboard", tracker.tensorboard),
        "model.layer_spec": ("transformer_engine", layer_spec == "transformer_engine"),
        "rollout.engine": ("sglang", starts_sglang and engines.rollout.python is None),
    }
    for key, (package, is_wanted) in wanted.items():
        if is_wanted and find_spec(package) is None:
            yield f"{key}: needs the package {package}, which {sys.executable} does not have"


def check_places(run_dir: str, folders: Mapping[str, str]) -> None:
    """ConfigError where the run, or what it writes outside its folder, could not be written. Leaves nothing behind."""
    for key, folder in {"run.dir": run_dir, **folders}.items():
        check_place(key, folder)


def check_writable(folders: Mapping[str, str]) -> None:
    """Make the folders that a run writes outside its own; ValueError when one cannot be written to."""
    for key, folder in folders.items():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{key}: cannot write to {folder}: {error.strerror or error}") from error
        check_place(key, folder)
