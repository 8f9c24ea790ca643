"""One trainer rank, under torchrun's environment variables. Rank 0 drives the loop; the others wait for its commands.

    torchrun --nnodes N --nproc-per-node G -m rlx.cli.worker CONFIG.yaml [key=value ...]     the whole job
    python -m rlx.cli.worker RUN_DIR --endpoints-file FILE     one rank of a run that a launcher of ours prepared

Exit status: 0 done; 1 failed; 2 wrong configuration; 75 saved and left because SIGUSR1 asked, to be started again with
run.resume=auto (0 where RLX_REQUEUE_FILE names a file, which then says so instead).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from rlx.cluster.colocation import clear_devices
from rlx.cluster.environment import RankEnvironment, leave_launcher_store, rank_environment, report_requeue
from rlx.cluster.finetuning import drive_finetuning
from rlx.cluster.fleet import Fleet, read_fleet
from rlx.cluster.parent import watch_parent
from rlx.cluster.ranks import Ranks
from rlx.cluster.stopping import REQUEUE_STATUS, StopRequest
from rlx.cluster.torchrun import join_run
from rlx.cluster.training import drive
from rlx.config.load import ConfigError, load_config
from rlx.config.schema import Config
from rlx.obs.log import log_failure, logger, phase, start_log
from rlx.parallel.context import ParallelContext, build_context, choose_device, connect, shut_down
from rlx.sync.occupation import EngineMemory
from rlx.trainer.finetune_worker import FinetuneWorker
from rlx.trainer.worker import Worker
from rlx.types import ParallelDims


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
        config = load_config(str(Path(args.run) / "config.yaml"), [])
        done = run_rank(config, where, args.endpoints_file, stop)
    except Exception as error:
        log_failure(error)
        # Peers may be inside a collective with us: leave without the orderly shutdown that would wait for them.
        sys.stderr.flush()
        os._exit(1)
    return 0 if done else REQUEUE_STATUS


def _main_from_config(args: argparse.Namespace, where: RankEnvironment, stop: StopRequest) -> int:
    try:
        with join_run(args.run, args.overrides, where, stop.is_set) as joined:
            done = run_rank(joined.config, where, joined.endpoints_file, stop)
    except ConfigError as error:
        for problem in error.problems:
            print(f"rlx: error: {problem}", file=sys.stderr)
        return 2
    return 0 if done or report_requeue() else REQUEUE_STATUS


def run_rank(config: Config, where: RankEnvironment, endpoints_file: Path, stop: StopRequest) -> bool:
    """Join the world, build the models, then drive (rank 0) or serve. False on rank 0 when asked to stop early."""
    if config.cluster.colocated and not config.is_finetuning:
        # Engines size their memory by what the GPU has free as they start, and then make room before a model is built.
        _wait_for_engines(endpoints_file, config)
    with phase("connect"):
        context = _join(config, where)
    worker = FinetuneWorker(config, context) if config.is_finetuning else _with_engines(config, context, endpoints_file)
    ranks = Ranks(worker)
    done = True
    if where.rank == 0:
        if config.is_finetuning:
            done = drive_finetuning(config, ranks, stop_asked=stop.is_set)
        else:
            done = drive(config, ranks, endpoints_file, stop_asked=stop.is_set)
        ranks.stop()
    else:
        ranks.serve()
    worker.close()
    context.barrier()
    shut_down()
    logger.info("done" if done else "saved and left, as SIGUSR1 asked")
    return done


def _with_engines(config: Config, context: ParallelContext, endpoints_file: Path) -> Worker:
    memory = EngineMemory()
    if config.cluster.colocated:
        memory = clear_devices(config, context, read_fleet(endpoints_file))
    worker = Worker(config, context)
    worker.engines.use(_wait_for_engines(endpoints_file, config).keys, memory)
    return worker


def _join(config: Config, where: RankEnvironment) -> ParallelContext:
    layout = config.parallel
    dims = ParallelDims(
        world_size=where.world_size,
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        cp=layout.cp,
        ep=layout.ep,
        etp=layout.etp,
        sequence_parallel=layout.sequence_parallel,
    )
    device = choose_device(config.cluster.device, where.local_rank)
    limit_s = config.run.failure_timeout_s
    connect(init_method="env://", rank=where.rank, world_size=where.world_size, device=device, timeout_s=limit_s)
    leave_launcher_store()
    return build_context(dims, device, seed=config.run.seed, timeout_s=limit_s)


def _wait_for_engines(file: Path, config: Config) -> Fleet:
    with phase("wait for engines"):
        timeout_s = config.rollout.start_timeout_s + 60
        deadline = time.monotonic() + timeout_s
        while not file.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no engines in {file} after {timeout_s:.0f} s")
            time.sleep(0.05)
        return read_fleet(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rlx.cli.worker", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
