"""``rlx check``: validate a configuration, print it resolved, say in a few lines what would run. Starts nothing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import sizes_of
from rlx.config.load import ConfigError, dump_config, load_config, on_paper
from rlx.config.memory import describe, estimate, memory_problems
from rlx.config.packaged import packaged
from rlx.config.schema import Config
from rlx.config.sharing import describe_phases, shared_phases, sharing_problems
from rlx.placement.from_config import check_spanning, seats_of
from rlx.placement.seats import PlacementError, picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file's")
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
    print(dump_config(config), end="")
    for line in lines:
        print(f"# {line}")
    return 0


def plan(config: Config) -> list[str]:
    """Who sits where and what memory that takes; ConfigError when it does not fit on the GPUs that the file names."""
    try:
        seats = seats_of(config)
        check_spanning(config, seats)
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
    return f"{config.rollout.num_engines} {config.rollout.engine} engines"
