"""What every trainer rank does, whoever started it: join the world, build the models, drive or serve, leave."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from rlx.config.schema import Config
from rlx.driver.colocation import clear_devices
from rlx.driver.finetuning import drive_finetuning
from rlx.driver.ranks import Ranks
from rlx.driver.training import drive, drive_evaluation
from rlx.engines.fleet import Fleet, read_fleet
from rlx.obs.log import logger, phase
from rlx.parallel.context import ParallelContext, build_context, connect, shut_down
from rlx.processes.environment import RankEnvironment, leave_launcher_store
from rlx.sync.engine_memory import EngineMemory
from rlx.trainer.finetune_worker import FinetuneWorker
from rlx.trainer.worker import Worker


def run_rank(
    config: Config, where: RankEnvironment, device: torch.device, endpoints_file: Path, stop_asked: Callable[[], bool]
) -> bool:
    """Join the world, build the models, then drive (rank 0) or serve. False on rank 0 when asked to stop early."""
    if config.cluster.colocated and not config.is_finetuning:
        # Engines size their memory by what the GPU has free as they start, and then make room before a model is built.
        _wait_for_engines(endpoints_file, config)
    with phase("connect"):
        context = _join(config, where, device)
    worker = FinetuneWorker(config, context) if config.is_finetuning else _with_engines(config, context, endpoints_file)
    ranks = Ranks(worker)
    done = True
    if where.rank == 0:
        if config.is_finetuning:
            done = drive_finetuning(config, ranks, stop_asked=stop_asked)
        elif config.evaluation.only:
            drive_evaluation(config, ranks, endpoints_file)
        else:
            done = drive(config, ranks, endpoints_file, stop_asked=stop_asked)
        ranks.stop()
    else:
        ranks.serve()
    worker.close()
    context.barrier()
    shut_down()
    logger.info("done" if done else "saved and left, as asked")
    return done


def _with_engines(config: Config, context: ParallelContext, endpoints_file: Path) -> Worker:
    memory = EngineMemory()
    if config.cluster.colocated:
        memory = clear_devices(config, context, read_fleet(endpoints_file))
    worker = Worker(config, context)
    worker.engines.use(_wait_for_engines(endpoints_file, config).keys, memory)
    return worker


def _join(config: Config, where: RankEnvironment, device: torch.device) -> ParallelContext:
    dims = config.parallel.dims(where.world_size)
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
