"""``rlx check``: validate a configuration, print it resolved, say in a few lines what would run. Starts nothing."""

from __future__ import annotations

import argparse

from rlx.config.load import dump_config, load_config
from rlx.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over the file's")


def main(args: argparse.Namespace) -> int:
    """Print the resolved YAML, then the summary as YAML comments, so that the whole output is a configuration file."""
    config = load_config(args.config, args.overrides)
    print(dump_config(config), end="")
    for line in summary(config):
        print(f"# {line}")
    return 0


def summary(config: Config) -> list[str]:
    """World, layout and batch sizes in words."""
    parallel, rollout, algorithm = config.parallel, config.rollout, config.algorithm
    ranks = config.num_trainer_ranks
    dp = ranks // (parallel.tp * parallel.pp * parallel.cp)
    samples = config.data.prompts_per_step * rollout.samples_per_prompt
    layout = f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}, vpp {parallel.vpp}, ep {parallel.ep}"
    return [
        f"world: {ranks} trainer ranks + {_engines(config)} ({config.cluster.launcher}, device {config.cluster.device})",
        f"layout: {layout}, sequence parallel {'on' if parallel.sequence_parallel else 'off'}",
        f"batch: {config.data.prompts_per_step} prompts x {rollout.samples_per_prompt} answers = {samples} samples a step",
        f"update: {algorithm.name}, {algorithm.epochs} x {algorithm.num_mini_batches} optimizer steps a step,"
        f" {config.run.steps} steps",
    ]


def _engines(config: Config) -> str:
    if config.rollout.replay is not None:
        return f"rollouts replayed from {config.rollout.replay}"
    if config.rollout.endpoints:
        return f"{len(config.rollout.endpoints)} running engines"
    return f"{config.rollout.num_engines} {config.rollout.engine} engines"
