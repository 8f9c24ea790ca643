"""``rlx check``: validate a configuration and the files that it names, print it resolved, say in a few lines what would run.

Starts nothing. What ``rlx train`` refuses is refused here, but for what only later rows of a file or another machine show.
"""

from __future__ import annotations

import argparse
import os
import re
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import sizes_of
from rlx.cluster.checks.services import check_places
from rlx.cluster.without_torch import torch_hidden
from rlx.config.load import ConfigError, dump_config, load_config, on_paper
from rlx.config.memory import describe, estimate, memory_problems
from rlx.config.packaged import packaged
from rlx.config.parts import EngineSettings, written_folders
from rlx.config.schema import Config, RewardConfig
from rlx.config.sharing import describe_phases, shared_phases, sharing_problems
from rlx.placement.from_config import check_spanning, seats_of
from rlx.placement.seats import PlacementError, picture
from rlx.processes.rundir import check_run_dir

NUM_ROWS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file's")
    parser.add_argument("--all-rows", action="store_true", help=f"read data files to their end, not {NUM_ROWS:,} rows of each")
    add_on_paper(parser)


def add_on_paper(parser: argparse.ArgumentParser) -> None:
    """The option ``--on-paper [DIR]``."""
    parser.add_argument(
        "--on-paper",
        nargs="?",
        const="",
        metavar="DIR",
        help="the models and data need not be here: take shapes from DIR/NAME/config.json, NAME being the last part of"
        " model.path (default: configs/architectures of rlx)",
    )


def architectures(given: str | None) -> Path | None:
    """The folder that ``--on-paper`` means; None without it."""
    if given is None:
        return None
    folder = Path(given) if given else packaged("configs/architectures")
    if folder is None or not os.path.isdir(folder):
        raise ConfigError([f"--on-paper: no such folder {folder or 'configs/architectures in this installation'}"])
    return folder


def main(args: argparse.Namespace) -> int:
    """Print the resolved YAML, then the summary as YAML comments, so that the whole output is a configuration file."""
    paper = architectures(args.on_paper)
    config = load_config(args.config, args.overrides, paper)
    lines = [*summary(config), *plan(on_paper(config, paper))]
    if paper is None:
        _look(config, None if args.all_rows else NUM_ROWS, owns_process=getattr(args, "owns_process", False))
    print(dump_config(config), end="")
    for line in lines:
        print(f"# {line}")
    return 0


def _look(config: Config, num_rows: int | None, owns_process: bool) -> None:
    """Everything that ``rlx train`` looks at; ConfigError lists what is wrong. What this machine and this run folder are in the
    way of is a warning. A process of our own does it without torch."""
    with torch_hidden() if owns_process and not _loads_models(config.reward) else nullcontext():
        preflight = import_module("rlx.cluster.preflight")
    found = preflight.inspect(config, num_rows)
    found.warnings += preflight.environment_problems(config.tracker, config.model.layer_spec, EngineSettings.of(config))
    found.attempt(lambda: check_places(config.run.dir, written_folders(config)))
    found.problems += preflight.resumption_problems(config, num_rows)
    try:
        check_run_dir(config.run, evaluates=config.evaluation.only)
    except ConfigError as error:
        found.warnings += error.problems
    found.say_warnings()
    if found.problems:
        raise ConfigError(found.problems)


def _loads_models(reward: RewardConfig) -> bool:
    """Whether a file of the reward's may want transformers' models while it is imported."""
    files = re.findall(r"[^'\"\s]+\.py(?=:)", f"{reward.name} {reward.args}")
    return any("transformers" in Path(file).read_text(errors="replace") for file in files if Path(file).is_file())


def plan(config: Config) -> list[str]:
    """Who sits where and what memory that takes; ConfigError when it does not fit on the GPUs that the file names."""
    try:
        engines = EngineSettings.of(config)
        seats = seats_of(engines, config.parallel)
        check_spanning(engines, seats)
    except PlacementError as error:
        raise ConfigError([str(error)]) from error
    sizes = sizes_of(read_architecture(config.model.path))
    found = estimate(config, sizes)
    phases = shared_phases(config, found, sizes)
    problems = [*memory_problems(found, config), *sharing_problems(phases, found, config)]
    if config.cluster.gpus_per_node is not None and problems:
        raise ConfigError(problems)
    return [*picture(seats), *describe(found, sizes), *describe_phases(phases, config)]


def summary(config: Config) -> list[str]:
    """World, layout and batch sizes in words."""
    parallel = config.parallel
    ranks = config.num_trainer_ranks
    dp = ranks // (parallel.tp * parallel.pp * parallel.cp)
    layout = f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}, vpp {parallel.vpp}, ep {parallel.ep}"
    return [
        f"world: {ranks} trainer ranks + {_engines(config)} ({config.cluster.launcher}, device {config.cluster.device})",
        f"layout: {layout}, sequence parallel {'on' if parallel.sequence_parallel else 'off'}",
        *(_finetuning(config) if config.is_finetuning else _reinforcement(config)),
    ]


def _finetuning(config: Config) -> list[str]:
    finetune = config.finetune
    what = "pairs" if finetune.is_paired else "examples"
    length = f"{config.run.steps} steps" if finetune.epochs is None else f"{finetune.epochs:g} epochs of {config.data.train}"
    reference = f", reference {config.model.reference_path or config.model.path}" if config.has_reference else ""
    fate = {"drop": "dropped", "truncate": "cut"}[finetune.overlong]
    return [
        f"batch: {finetune.examples_per_step} {what} a step, sequences over {finetune.max_tokens} tokens are {fate}",
        f"update: {finetune.objective} (rlx {finetune.command}), {length}{reference}",
    ]


def _reinforcement(config: Config) -> list[str]:
    rollout, algorithm = config.rollout, config.algorithm
    if config.evaluation.only:
        return [f"evaluation: {', '.join(name or one.path for name, one in config.evaluation.by_name.items())}; no training"]
    samples = config.data.prompts_per_step * rollout.samples_per_prompt
    return [
        f"batch: {config.data.prompts_per_step} prompts x {rollout.samples_per_prompt} answers = {samples} samples a step",
        f"update: {algorithm.name}, {algorithm.epochs} x {algorithm.num_mini_batches} optimizer steps a step,"
        f" {config.run.steps} steps",
    ]


def _engines(config: Config) -> str:
    if config.is_finetuning:
        return "no engines"
    if config.rollout.replay is not None:
        return f"rollouts replayed from {config.rollout.replay}"
    if config.rollout.endpoints:
        return f"{len(config.rollout.endpoints)} running engines"
    fp8 = " of FP8 weights" if config.rollout.fp8 else ""
    return f"{config.rollout.num_engines} {config.rollout.engine} engines{fp8}"
