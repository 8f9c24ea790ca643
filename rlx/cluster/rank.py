"""What every trainer rank does, whoever started it: join the world, build the models, drive or serve, leave."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rlx.cluster.environment import RankEnvironment, leave_launcher_store
from rlx.cluster.fleet import Fleet, read_fleet
from rlx.cluster.ranks import Ranks
from rlx.cluster.training import drive
from rlx.config.schema import Config
from rlx.obs.log import logger, phase
from rlx.parallel.context import ParallelContext, build_context, choose_device, connect, shut_down
from rlx.trainer.worker import Worker
from rlx.types import ParallelDims


def run_rank(config: Config, where: RankEnvironment, endpoints_file: Path, stop_asked: Callable[[], bool]) -> bool:
    """Join the world, build the models, then drive (rank 0) or serve. False on rank 0 when asked to stop early."""
    with phase("connect"):
        context = _join(config, where)
    worker = Worker(config, context)
    with phase("wait for engines"):
        worker.use_keys(_wait_for_engines(endpoints_file, config.rollout.start_timeout_s + 60).keys)
    ranks = Ranks(worker)
    done = True
    if where.rank == 0:
        done = drive(config, ranks, endpoints_file, stop_asked=stop_asked)
        ranks.stop()
    else:
        ranks.serve()
    worker.close()
    context.barrier()
    shut_down()
    logger.info("done" if done else "saved and left, as asked")
    return done


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


def _wait_for_engines(file: Path, timeout_s: float) -> Fleet:
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no engines in {file} after {timeout_s:.0f} s")
        time.sleep(0.05)
    return read_fleet(file)
