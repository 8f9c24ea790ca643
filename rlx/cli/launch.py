"""``rlx launch slurm CONFIG ...``: render an sbatch script for a configuration, and submit it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from rlx.cli.check import add_on_paper, architectures, plan, summary
from rlx.cluster.slurm import FLAVOURS, RUNTIMES, SlurmJob, job_config, passed_names, render, submit
from rlx.config.load import ConfigError, load_config, on_paper
from rlx.config.options import positive
from rlx.config.schema import ClusterConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    schedulers = parser.add_subparsers(title="schedulers", metavar="SCHEDULER", required=True)
    slurm = schedulers.add_parser("slurm", help="a job for SLURM", description=__doc__)
    slurm.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    slurm.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    slurm.add_argument("--nodes", type=positive, help="all nodes of the job; default: cluster.nodes")
    slurm.add_argument("--gpus-per-node", type=_gpus, metavar="[TYPE:]G", help="8, h100:8; 0: no GPUs; default: cluster's")
    slurm.add_argument("--cpus-per-task", type=positive, metavar="N", help="CPUs of a node for the job's task there")
    slurm.add_argument("--mem", metavar="SIZE", help="host memory of a node, as SLURM spells it; 0: all")
    slurm.add_argument("--exclusive", action="store_true", help="nodes for this job alone")
    slurm.add_argument("--flavour", choices=FLAVOURS, default="torchrun", help="what starts the ranks on the nodes")
    slurm.add_argument("--rollout-nodes", type=int, help="of the nodes, those for engines only; default: cluster's")
    slurm.add_argument("--partition", help="SLURM partition; none: the cluster's default")
    slurm.add_argument("--time", default="24:00:00", help="time limit of one start; the job goes on in the next")
    slurm.add_argument("--save-before", type=positive, default=600, metavar="S", help="seconds before the limit to save at")
    slurm.add_argument("--threads", type=positive, help="CPU threads of a process; default: its share of the task's CPUs")
    slurm.add_argument("--name", default="rlx", help="name of the job")
    slurm.add_argument("--log-dir", default="slurm-logs", help="folder for the job's and the tasks' output")
    slurm.add_argument("--prologue", metavar="FILE", help="bash that is read before anything starts: module load ...")
    slurm.add_argument("--container", help="image to run in; models and data are mounted")
    slurm.add_argument("--container-runtime", choices=RUNTIMES, help="what runs it: pyxis (enroot) or apptainer")
    slurm.add_argument("--container-python", default="python3", metavar="PROGRAM", help="its interpreter; default: python3")
    slurm.add_argument("--mount", action="append", default=[], metavar="PATH[:PATH]", help="further folder for the container")
    slurm.add_argument("--pass", dest="passed", action="append", default=[], metavar="NAME", help="further variable for the job")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="further #SBATCH option: account=me")
    add_on_paper(slurm)
    slurm.add_argument("--template", type=Path, help="template of your own, in place of launch/slurm/FLAVOUR.sbatch.j2")
    slurm.add_argument("--out", type=Path, help="where to keep the script; default: LOG_DIR/NAME.sbatch")
    slurm.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 submitted (or printed); 1 sbatch refused it; 2 wrong configuration or options."""
    try:
        paper = architectures(args.on_paper)
        job = _job(args, load_config(args.config, args.overrides, paper).cluster)
        run = job_config(args.config, args.overrides, job, paper)
        notes = [*summary(run.config), *plan(on_paper(run.config, paper))]
        script = render(run, job, notes, args.template)
    except ConfigError as error:
        for problem in error.problems:
            print(f"rlx: error: {problem}", file=sys.stderr)
        return 2
    if args.dry_run:
        print(script, end="")
        return 0
    path = args.out or Path(job.log_dir) / f"{job.name}.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(job.log_dir).mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    try:
        number = submit(path)
    except RuntimeError as error:
        print(f"rlx: error: {error}", file=sys.stderr)
        return 1
    print(f"rlx: submitted job {number}; script: {path}; output: {job.log_dir}/{number}.log")
    return 0


def _job(args: argparse.Namespace, cluster: ClusterConfig) -> SlurmJob:
    """What the options say, and where they are silent the configuration."""
    nodes: int | None = args.nodes or cluster.nodes
    gpus: tuple[str, int | None] = args.gpus_per_node or ("", cluster.gpus_per_node)
    gpu_type, gpus_per_node = gpus
    if nodes is None or gpus_per_node is None:
        raise ConfigError(["--nodes and --gpus-per-node: required where the configuration lacks cluster.nodes or gpus_per_node"])
    return SlurmJob(
        name=args.name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu_type=gpu_type,
        cpus_per_task=args.cpus_per_task,
        mem=args.mem,
        exclusive=args.exclusive,
        flavour=args.flavour,
        rollout_nodes=cluster.rollout_nodes if args.rollout_nodes is None else args.rollout_nodes,
        partition=args.partition,
        time=args.time,
        save_before_s=args.save_before,
        threads=args.threads,
        log_dir=os.path.abspath(args.log_dir),
        prologue=args.prologue,
        container=args.container,
        runtime=args.container_runtime,
        python=args.container_python,
        mounts=tuple(args.mount),
        passed=tuple(dict.fromkeys([*passed_names(in_container=bool(args.container)), *args.passed])),
        options=tuple(option.lstrip("-") for option in args.sbatch),
    )


def _gpus(text: str) -> tuple[str, int]:
    """``[TYPE:]NUMBER``."""
    match = re.fullmatch(r"(?:([\w.-]+):)?(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a number, or TYPE:NUMBER such as h100:8, got {text}")
    return match[1] or "", int(match[2])
