"""From a configuration and a few options to an sbatch script, and on to ``sbatch``.

The templates lie in ``launch/slurm`` of a checkout, or in ``share/rlx/launch/slurm`` of an installation.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from rlx.config.load import ConfigError, load_config
from rlx.config.packaged import CHECKOUT, PLACES, packaged
from rlx.config.schema import Config
from rlx.placement.from_config import seats_of
from rlx.placement.seats import PlacementError, picture

RUNTIMES = ("pyxis", "apptainer")
FLAVOURS = ("torchrun", "ray")
_OWN_OPTIONS = ("nodes", "ntasks", "ntasks-per-node", "export", "signal", "requeue", "open-mode", "output", "time", "partition")
_SUBMIT_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """What SLURM is asked for. ``gpus_per_node`` 0: a job on CPUs. ``save_before_s``: how long before ``time`` the run is
    told to save; a step and a checkpoint must fit into it. ``passed``: variables of the submitting shell that the job sees.
    ``options``: further ``#SBATCH`` options without the dashes."""

    name: str
    nodes: int
    gpus_per_node: int
    log_dir: str
    flavour: str = "torchrun"
    rollout_nodes: int = 0
    partition: str | None = None
    time: str = "24:00:00"
    save_before_s: int = 600
    threads: int = 8
    container: str | None = None
    runtime: str | None = None
    mounts: tuple[str, ...] = ()
    passed: tuple[str, ...] = ("PATH", "HOME")
    options: tuple[str, ...] = ()


def job_config(path: str, overrides: Sequence[str], job: SlurmJob) -> tuple[Config, list[str]]:
    """The configuration as the job will see it, and the overrides that make it so. ConfigError as usual."""
    added = [f"cluster.launcher={job.flavour}", f"cluster.nodes={job.nodes}", f"cluster.rollout_nodes={job.rollout_nodes}"]
    if job.gpus_per_node:
        added.append(f"cluster.gpus_per_node={job.gpus_per_node}")
        given = load_config(path, overrides).cluster.num_trainer_ranks
        if job.rollout_nodes and given is None:
            added.append(f"cluster.num_trainer_ranks={(job.nodes - job.rollout_nodes) * job.gpus_per_node}")
    # Ray's nodes may join minutes after its head.
    first = ["cluster.ray_wait_s=600"] if job.flavour == "ray" else []
    everything = [*first, *overrides, *added, "run.resume=auto", "run.overwrite=false"]
    return load_config(path, everything), everything


def render(path: str, overrides: Sequence[str], job: SlurmJob, template: Path | None = None) -> str:
    """The sbatch script. ConfigError when the configuration, the placement or an option is wrong."""
    _check(job)
    config, everything = job_config(path, overrides, job)
    try:
        seats = seats_of(config)
    except PlacementError as error:
        raise ConfigError([str(error)]) from error
    source = template or template_folder() / f"{job.flavour}.sbatch.j2"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["q"] = shlex.quote
    root = CHECKOUT
    values = {
        "title": f"{Path(path).name}: {config.num_trainer_ranks} trainer rank(s) and {len(seats.engines)} engine(s)",
        "job": job,
        "command": config.command,
        "picture": picture(seats),
        "trainer_nodes": job.nodes - job.rollout_nodes,
        "ranks_per_node": seats.ranks_per_node,
        "workdir": str(Path.cwd()),
        "python": sys.executable,
        "pythonpath": str(root),
        "torchrun": str(template_folder().parent / "torchrun.sh"),
        "mounts": list(
            dict.fromkeys([str(Path.cwd()), str(root), str(Path(os.path.realpath(config.run.dir)).parent), "/tmp", *job.mounts])
        ),
        "config_arguments": [str(Path(path).resolve()), *everything],
    }
    try:
        return environment.from_string(source.read_text()).render(values)
    except (OSError, jinja2.TemplateError) as error:
        raise ConfigError([f"--template {source}: {error}"]) from error


def template_folder() -> Path:
    """Where the templates are. ConfigError when the installation lacks them."""
    found = packaged("launch/slurm")
    if found is None:
        raise ConfigError([f"no launch/slurm in {' or '.join(map(str, PLACES))}: install rlx anew"])
    return found


def submit(script: Path) -> str:
    """Give the script to sbatch; the job's number. RuntimeError with sbatch's own words when it refuses."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=_SUBMIT_LIMIT_S, check=False
        )
    except FileNotFoundError:
        raise RuntimeError(f"there is no sbatch here; the script is {script}: submit it where SLURM is") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"sbatch did not answer within {_SUBMIT_LIMIT_S:g} s; the script is {script}") from None
    if done.returncode:
        raise RuntimeError(f"sbatch refused {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def _check(job: SlurmJob) -> None:
    problems = []
    if job.container and job.runtime not in RUNTIMES:
        problems.append(f"--container needs --container-runtime {' or '.join(RUNTIMES)}")
    if not 0 <= job.rollout_nodes < job.nodes:
        problems.append(f"--rollout-nodes {job.rollout_nodes} of --nodes {job.nodes} leaves none to train on")
    limit = _seconds(job.time)
    if limit is None:
        problems.append(f"--time {job.time}: expected MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
    elif job.save_before_s >= limit:
        problems.append(f"--save-before {job.save_before_s} s is not before the limit of {limit} s (--time {job.time})")
    for option in job.options:
        name = re.split(r"[= ]", option.lstrip("-"), maxsplit=1)[0]
        if name in _OWN_OPTIONS:
            problems.append(f"--sbatch {option}: rlx sets {name} itself")
        if "\n" in option:
            problems.append(f"--sbatch {option!r} holds a line break")
    if problems:
        raise ConfigError(problems)


def _seconds(text: str) -> float | None:
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return math.inf if text.upper() == "UNLIMITED" else None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = [3600, 60, 1] if days or len(numbers) == 3 else [60, 1]
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))
