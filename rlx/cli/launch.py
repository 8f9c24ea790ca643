"""``rlx launch slurm CONFIG ...``: render an sbatch script for a configuration, and submit it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rlx.cluster.slurm import FLAVOURS, RUNTIMES, SlurmJob, render, submit
from rlx.config.load import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    schedulers = parser.add_subparsers(title="schedulers", metavar="SCHEDULER", required=True)
    slurm = schedulers.add_parser("slurm", help="a job for SLURM", description=__doc__)
    slurm.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    slurm.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's; right after CONFIG")
    slurm.add_argument("--nodes", type=_positive, required=True, help="all nodes of the job")
    slurm.add_argument("--gpus-per-node", type=int, required=True, help="0: a job on CPUs")
    slurm.add_argument("--flavour", choices=FLAVOURS, default="torchrun", help="what starts the ranks on the nodes")
    slurm.add_argument("--rollout-nodes", type=int, default=0, help="of the nodes, those for engines only")
    slurm.add_argument("--partition", help="SLURM partition; none: the cluster's default")
    slurm.add_argument("--time", default="24:00:00", help="time limit of one start; the job goes on in the next")
    slurm.add_argument("--save-before", type=_positive, default=600, metavar="S", help="seconds before the limit to save at")
    slurm.add_argument("--threads", type=_positive, default=8, help="CPU threads of a process")
    slurm.add_argument("--name", default="rlx", help="name of the job")
    slurm.add_argument("--log-dir", default="slurm-logs", help="folder for the job's and the tasks' output")
    slurm.add_argument("--container", help="image to run in")
    slurm.add_argument("--container-runtime", choices=RUNTIMES, help="what runs it: pyxis (enroot) or apptainer")
    slurm.add_argument("--mount", action="append", default=[], metavar="PATH[:PATH]", help="further folder for the container")
    slurm.add_argument("--pass", dest="passed", action="append", default=[], metavar="NAME", help="variable to hand to the job")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="further #SBATCH option: account=me")
    slurm.add_argument("--template", type=Path, help="template of your own, in place of launch/slurm/FLAVOUR.sbatch.j2")
    slurm.add_argument("--out", type=Path, help="where to keep the script; default: LOG_DIR/NAME.sbatch")
    slurm.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 submitted (or printed); 1 sbatch refused it; 2 wrong configuration or options."""
    job = SlurmJob(
        name=args.name,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        flavour=args.flavour,
        rollout_nodes=args.rollout_nodes,
        partition=args.partition,
        time=args.time,
        save_before_s=args.save_before,
        threads=args.threads,
        log_dir=os.path.abspath(args.log_dir),
        container=args.container,
        runtime=args.container_runtime,
        mounts=tuple(args.mount),
        passed=("PATH", "HOME", *args.passed),
        options=tuple(option.lstrip("-") for option in args.sbatch),
    )
    try:
        script = render(args.config, args.overrides, job, args.template)
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
