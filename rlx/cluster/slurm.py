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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from rlx.config.load import ConfigError, config_files, load_config
from rlx.config.packaged import CHECKOUT, PLACES, packaged
from rlx.config.parts import EngineSettings
from rlx.config.schema import Config
from rlx.config.sources import task_of
from rlx.placement.from_config import seats_of
from rlx.placement.seats import PlacementError
from rlx.processes.children import JOB_ID, LAUNCH_ID
from rlx.processes.environment import HANDED_ON

RUNTIMES = ("pyxis", "apptainer")
FLAVOURS = ("torchrun", "ray")
# What the script sets, and by which option of ours; none: always the same.
_OWN_OPTIONS = {
    name: name for name in ("nodes", "gpus-per-node", "cpus-per-task", "mem", "exclusive", "time", "partition", "rollout-nodes")
} | {"export": "pass", "signal": "save-before", "output": "log-dir", "job-name": "name"}
_OWN_OPTIONS |= dict.fromkeys(("ntasks", "ntasks-per-node", "requeue", "open-mode"), "")
_SUBMIT_LIMIT_S = 60.0
SHARED = (Path("/tmp"),)
"""What a container has of its node in any case."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """What SLURM is asked for. ``gpus_per_node`` 0: a job on CPUs. ``save_before_s``: how long before ``time`` the run is
    told to save; a step and a checkpoint must fit into it. ``passed``: variables of the submitting shell that the job sees.
    ``python``: the interpreter in the container. ``options``: further ``#SBATCH`` options without the dashes."""

    name: str
    nodes: int
    gpus_per_node: int
    log_dir: str
    gpu_type: str = ""
    cpus_per_task: int | None = None
    mem: str | None = None
    exclusive: bool = False
    flavour: str = "torchrun"
    rollout_nodes: int = 0
    partition: str | None = None
    time: str = "24:00:00"
    save_before_s: int = 600
    threads: int | None = None
    prologue: str | None = None
    container: str | None = None
    runtime: str | None = None
    python: str = "python3"
    mounts: tuple[str, ...] = ()
    passed: tuple[str, ...] = ("PATH", "HOME")
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """The configuration as the job will see it; the arguments of ``rlx train`` that make it so; the files these come from."""

    config: Config
    arguments: tuple[str, ...]
    files: tuple[Path, ...]

    def needed_paths(self) -> list[Path]:
        """The models, data and reward files that the configuration names, as a node must see them. Hub ids are none."""
        config = self.config
        model, data, evaluation = config.model, config.data, config.evaluation
        named = [model.path, model.reference_path, model.critic_path, model.tokenizer_path, config.rollout.replay]
        named += [data.train, data.chat_template, evaluation.data]
        named += [source.path for source in (*data.sources.values(), *evaluation.sets.values())]
        functions = (config.reward.name, config.reward.args, config.algorithm.loss, config.algorithm.advantages)
        named += re.findall(r"[^\s'\"]+\.py(?=:\w)", " ".join(map(str, functions)))
        paths = [text for text in dict.fromkeys(named) if text and task_of(text) is None]
        files = (".jsonl", ".parquet", ".jinja", ".py")
        return [
            Path(text).absolute() for text in paths if Path(text).exists() or text.endswith(files) or not _HUB_ID.fullmatch(text)
        ]


def passed_names(names: Iterable[str] = os.environ, *, in_container: bool) -> tuple[str, ...]:
    """Of a shell's variables those that a job gets unasked: where programs are, and the settings of a run's libraries. A
    container has its own library path."""
    always = ("PATH", "HOME", *(() if in_container else ("LD_LIBRARY_PATH",)))
    marks = (LAUNCH_ID, JOB_ID, "RLX_STOP_FILE", "RLX_REQUEUE_FILE", "RLX_CAUSE_FILE")
    return (*always, *sorted(name for name in names if name.startswith(HANDED_ON) and name not in marks))


def job_config(path: str, overrides: Sequence[str], job: SlurmJob, architectures: Path | None = None) -> JobConfig:
    """What the job runs. ConfigError when the configuration or an option is wrong; ``architectures`` as in ``load_config``."""
    _check(job)
    added = [f"cluster.launcher={job.flavour}", f"cluster.nodes={job.nodes}", f"cluster.rollout_nodes={job.rollout_nodes}"]
    if job.gpus_per_node:
        added.append(f"cluster.gpus_per_node={job.gpus_per_node}")
        given = load_config(path, overrides, architectures).cluster.num_trainer_ranks
        if job.rollout_nodes and given is None:
            added.append(f"cluster.num_trainer_ranks={(job.nodes - job.rollout_nodes) * job.gpus_per_node}")
    # Ray's nodes may join minutes after its head.
    first = ["cluster.ray_wait_s=600"] if job.flavour == "ray" else []
    everything = [*first, *overrides, *added, "run.resume=auto", "run.overwrite=false"]
    config = load_config(path, everything, architectures)
    return JobConfig(config=config, arguments=(str(Path(path).resolve()), *everything), files=tuple(config_files(path)))


def render(run: JobConfig, job: SlurmJob, notes: Sequence[str] = (), template: Path | None = None) -> str:
    """The sbatch script, ``notes`` at its head. ConfigError when the placement or the template is wrong."""
    config = run.config
    try:
        seats = seats_of(EngineSettings.of(config), config.parallel)
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
    needed = run.needed_paths()
    launch = template_folder().parent
    values = {
        "title": f"{run.files[0].name}: {config.num_trainer_ranks} trainer rank(s) and {len(seats.engines)} engine(s)",
        "job": job,
        "command": config.command,
        "notes": notes,
        "trainer_nodes": job.nodes - job.rollout_nodes,
        "ranks_per_node": seats.ranks_per_node,
        "workdir": str(Path.cwd()),
        "prologue": job.prologue and str(Path(job.prologue).resolve()),
        # A container has its own packages: of ours it takes a checkout alone.
        "python": job.python if job.container else sys.executable,
        "pythonpath": str(CHECKOUT) if launch.is_relative_to(CHECKOUT) or not job.container else "",
        "torchrun": str(launch / "torchrun.sh"),
        "needed": [str(path) for path in needed],
        "hub_cache": str(_hub_cache()),
        "mounts": _mounts(run, job, needed) if job.container else [],
        "config_arguments": run.arguments,
    }
    try:
        return environment.from_string(source.read_text()).render(values)
    except (OSError, jinja2.TemplateError) as error:
        raise ConfigError([f"--template {source}: {error}"]) from error


def _mounts(run: JobConfig, job: SlurmJob, needed: Sequence[Path]) -> list[str]:
    """Folders that the container must have under the same paths: none inside another. A link's target is there too, as the
    files of a snapshot in the hub's cache are links."""
    config = run.config
    launch = template_folder().parent
    folders = [*SHARED, Path.cwd(), CHECKOUT if launch.is_relative_to(CHECKOUT) else launch, Path(job.log_dir)]
    folders += [Path(config.run.dir).absolute().parent, *(Path(folder).absolute() for folder in [config.sync.dir] if folder)]
    for path in (*needed, *run.files):
        folders.append(path if path.is_dir() else path.parent)
        folders += [file.resolve().parent for file in (path.iterdir() if path.is_dir() else [path])]
    if _hub_cache().is_dir():
        folders.append(_hub_cache())
    outer = [folder for folder in folders if not any(other != folder and folder.is_relative_to(other) for other in folders)]
    mounts = list(dict.fromkeys([*map(str, outer), *job.mounts]))
    problems = [f"--mount: {mount} cannot be mounted, its name has a comma" for mount in mounts if "," in mount]
    problems += [f"--mount: {folder} cannot be mounted, its name has a colon" for folder in map(str, outer) if ":" in folder]
    if problems:
        raise ConfigError(problems)
    return mounts


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface").absolute()


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
    if job.container and re.search(r"^[./~]|\.(sif|sqsh)$", job.container) and not Path(job.container).exists():
        problems.append(f"--container: no such image {job.container}")
    if job.prologue and not Path(job.prologue).is_file():
        problems.append(f"--prologue: no such file {job.prologue}")
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
            own = f"; use --{_OWN_OPTIONS[name]}" if _OWN_OPTIONS[name] else ""
            problems.append(f"--sbatch {option}: rlx sets {name} itself{own}")
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
