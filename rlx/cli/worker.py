"""One trainer rank, under torchrun's environment variables: it runs the commands of the driver, which rank 0 starts.

    torchrun --nnodes N --nproc-per-node G -m rlx.cli.worker CONFIG.yaml [key=value ...]     the whole job
    python -m rlx.cli.worker RUN_DIR --endpoints-file FILE     one rank of a run that a launcher of ours prepared

Exit status: 0 done; 1 failed; 2 wrong configuration; 75 (the whole job's rank 0) saved and left because SIGUSR1 asked, to be
started again with run.resume=auto (0 where RLX_REQUEUE_FILE names a file, which then says so instead).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from rlx.config.load import ConfigError, load_config
from rlx.obs.log import log_failure, start_log
from rlx.processes.environment import (
    RankEnvironment,
    hide_gpus,
    rank_environment,
    report_cause,
    report_requeue,
)
from rlx.processes.parent_watch import watch_parent
from rlx.processes.rundir import ENDPOINTS
from rlx.processes.stopping import REQUEUE_STATUS, StopRequest
from rlx.processes.threads import forget_launchers_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="configuration file, or a prepared run folder with config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--endpoints-file", type=Path, help="the launcher's list of engines; waited for; means a prepared run")
    parser.add_argument("--parent-pipe", type=int, help="inherited pipe whose end of file means that the launcher died")


def main(args: argparse.Namespace) -> int:
    where = rank_environment()
    start_log("trainer", where.rank)
    stop = StopRequest()
    if args.endpoints_file is None:
        return _main_from_config(args, where, stop)
    if args.parent_pipe is not None:
        watch_parent(args.parent_pipe)
    # A launcher that stops the job sends SIGTERM; the default would be the same, but without this line in the log.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _run_rank(Path(args.run), where, args.endpoints_file)
    except Exception as error:
        log_failure(error)
        # Peers may be inside a collective with us: leave without the orderly shutdown that would wait for them.
        sys.stderr.flush()
        os._exit(1)
    return 0


def _main_from_config(args: argparse.Namespace, where: RankEnvironment, stop: StopRequest) -> int:
    try:
        # torch, which it meets the others by, comes in without the GPUs that the run is not to see and torchrun's own threads.
        forget_launchers_threads()
        hide_gpus(_device_of(args))
        join_run = import_module("rlx.cluster.torchrun").join_run
        with join_run(args.run, args.overrides, where, stop.is_set) as joined:
            joined.done = _run_rank(joined.run_dir, where, joined.run_dir / ENDPOINTS)
    except ConfigError as error:
        lines = [f"rlx: error: {problem}" for problem in error.problems]
        print("\n".join(lines), file=sys.stderr)
        report_cause(lines)
        return 2
    left_early = where.rank == 0 and not joined.done
    return REQUEUE_STATUS if left_early and not report_requeue() else 0


def _device_of(args: argparse.Namespace) -> str:
    """``cluster.device`` as far as this rank can tell: what is wrong with the configuration is rank 0's to say."""
    try:
        return load_config(args.run, args.overrides).cluster.device
    except ConfigError:
        return "auto"


def _run_rank(run_dir: Path, where: RankEnvironment, engines: Path) -> bool:
    """The models' libraries take seconds to import: not before the run is known to begin, nor before the device is settled."""
    config = load_config(str(run_dir / "config.yaml"), [])
    settings = import_module("rlx.processes.device")
    device = settings.take_device(config.cluster.device, where.local_rank)
    settings.take_threads(config.cluster.threads_per_rank, where.ranks_here)
    run_rank: Callable[..., bool] = import_module("rlx.cluster.rank").run_rank
    return run_rank(config, where, device, engines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rlx.cli.worker", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
