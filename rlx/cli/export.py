"""``rlx export``: a checkpoint of a run as a Hugging Face folder, also while the run goes on.

One process on the CPU holds the model once, in the run's ``model.dtype``; ``python -m converters megatron-to-hf`` streams those
that are too large for that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlx.config.load import ConfigError, load_run
from rlx.driver.checkpoint import whole_checkpoints
from rlx.processes.local_ranks import run_local_ranks, this_module
from rlx.processes.rundir import check_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run's folder; start in the folder that the run was started in"
    )
    parser.add_argument("--step", type=int, metavar="N", help="of which step; the newest checkpoint when left out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: RUN_DIR/hf-step-N)")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0 written; 2 nothing to export, or something in the way; 1 it failed."""
    step, checkpoint = _chosen(args.run_dir, args.step)
    out = args.out or args.run_dir / f"hf-step-{step}"
    model = load_run(args.run_dir).model.path
    if not Path(model).is_dir():
        raise ConfigError([f"model.path: no such folder {model}; paths are relative to the folder that the run was started in"])
    if out.exists():
        raise ConfigError([f"--out {out} is there already; remove it or name another folder"])
    try:
        check_place("--out", str(out))
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    status = run_local_ranks(this_module("rlx.cli.export_rank", str(args.run_dir), str(checkpoint), str(out)), 1)
    if status == 0:
        print(out)
    elif not checkpoint.is_dir():
        print(f"rlx export: the run dropped {checkpoint} meanwhile (checkpoint.keep); take a newer one", file=sys.stderr)
    return status


def _chosen(run_dir: Path, step: int | None) -> tuple[int, Path]:
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError([f"{run_dir} is not a run folder: it has no config.yaml"])
    found = dict(whole_checkpoints(run_dir / "checkpoints"))
    if not found:
        raise ConfigError([f"{run_dir} has no whole checkpoint yet (checkpoint.every, checkpoint.at_end)"])
    if step is not None and step not in found:
        raise ConfigError([f"--step {step}: {run_dir} has checkpoints of steps {', '.join(map(str, found))}"])
    chosen = max(found) if step is None else step
    return chosen, found[chosen]
