"""What every trainer rank does, whoever started it: join the world and the driver, build the models, serve, leave."""

from __future__ import annotations

from pathlib import Path

import torch

from rlx.cluster.colocation import clear_devices
from rlx.config.parts import EngineSettings
from rlx.config.schema import Config
from rlx.driver.lane import find_driver, lane_secret
from rlx.engines.engine_plan import released_tags
from rlx.engines.fleet import read_fleet, wait_for_fleet
from rlx.obs.log import logger, phase
from rlx.parallel.context import build_context, connect, shut_down
from rlx.placement.from_config import trainers_of_engines
from rlx.processes.environment import RankEnvironment, leave_launcher_store, rendezvous
from rlx.sync.engine_memory import EngineMemory
from rlx.trainer.finetune_worker import FinetuneWorker
from rlx.trainer.lane import join_driver, serve, signs_of_life
from rlx.trainer.worker import Worker


def run_rank(config: Config, where: RankEnvironment, device: torch.device, endpoints_file: Path) -> bool:
    """Join, build the models and run the driver's commands to the end; False when the run was asked to stop early."""
    start_s, limit_s, shares = config.rollout.start_timeout_s, config.run.failure_timeout_s, config.cluster.colocated
    if shares and not config.is_finetuning:
        # Engines size their memory by what the GPU has free as they start, and then make room before a model is built.
        with phase("wait for engines"):
            wait_for_fleet(endpoints_file, start_s)
    with phase("connect"):
        meeting, dims = rendezvous(where), config.parallel.dims(where.world_size)
        connect(init_method="env://", rank=where.rank, world_size=where.world_size, device=device, timeout_s=limit_s)
        leave_launcher_store()
        context = build_context(dims, device, seed=config.run.seed, timeout_s=limit_s)
        channel = join_driver(find_driver(meeting, limit_s), lane_secret(endpoints_file.parent), where.rank, limit_s)
    with signs_of_life(channel):
        worker: Worker | FinetuneWorker
        if config.is_finetuning:
            worker = FinetuneWorker(config, context)
        else:
            memory = EngineMemory()
            if shares:
                tags = released_tags(config.cluster, config.rollout, device.type)
                memory = clear_devices(tags, context, read_fleet(endpoints_file), config.sync.timeout_s)
            nodes = where.world_size // where.ranks_here
            worker = Worker(config, context, trainers_of_engines(EngineSettings.of(config), config.parallel, device.type, nodes))
            with phase("wait for engines"):
                worker.engines.use(wait_for_fleet(endpoints_file, start_s).keys, memory)
        done = serve(channel, worker)
        worker.close()
        context.barrier()
    shut_down()
    logger.info("done" if done else "left, as asked")
    return done
