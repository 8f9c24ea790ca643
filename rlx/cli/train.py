"""``rlx train CONFIG.yaml [key=value ...]``: run the main job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from rlx.cluster.launch import Launch, OpenRun, run_job
from rlx.cluster.local import LocalLaunch
from rlx.cluster.preflight import preflight
from rlx.cluster.ray.address import find_cluster, prepare_environment
from rlx.cluster.resumption import nothing_left
from rlx.config.load import ConfigError, load_config
from rlx.config.parts import EngineSettings
from rlx.config.schema import Config
from rlx.placement.from_config import demand_of
from rlx.processes.environment import hide_gpus

_STARTS = "launch/torchrun.sh and rlx launch slurm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong configuration (nothing started), 128 + N stopped by signal N."""
    return start(args.config, args.overrides, "train")


def start(path: str, overrides: Sequence[str], command: str) -> int:
    """What ``rlx train`` and the other jobs have in common: run the configuration, which must be one for ``command``."""
    try:
        config = load_config(path, overrides)
        if config.command != command:
            key = f"finetune.objective: {config.finetune.objective}" if config.is_finetuning else "evaluation.only"
            raise ConfigError([f"{key} is not for rlx {command}; use rlx {config.command}"])
        hide_gpus(config.cluster.device)
        if config.cluster.launcher == "torchrun":
            raise ConfigError([f"cluster.launcher: torchrun is not started by rlx {command}; see {_STARTS}"])
        config = preflight(config)
        said = nothing_left(config.run, config.checkpoints, evaluates=config.evaluation.only)
        if said is not None:
            print(f"rlx: {said}", file=sys.stderr)
            return 0
        makes = _ray(config) if config.cluster.launcher == "ray" else partial(LocalLaunch, EngineSettings.of(config))
        return run_job(config, makes)
    except ConfigError as error:
        for problem in error.problems:
            print(f"rlx: error: {problem}", file=sys.stderr)
        return 2


def _ray(config: Config) -> Callable[[OpenRun], Launch]:
    """Ray is an extra: only this launcher needs it."""
    where = find_cluster(config.cluster)
    prepare_environment(where, config.run.failure_timeout_s)
    try:
        launcher = import_module("rlx.cluster.ray.launch")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(["cluster.launcher: ray needs the package ray: pip install 'rlx[ray]'"]) from error
    engines = EngineSettings.of(config)
    return partial(launcher.RayLaunch, engines, demand_of(engines, config.parallel), where)
