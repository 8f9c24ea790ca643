"""The driver's life: meet the ranks, run the training over the lane, let the ranks go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlx.config.schema import Config
from rlx.driver.finetune import drive_finetuning
from rlx.driver.lane import CommandLane, LaneError, Listener, announce_driver, lane_secret
from rlx.driver.training import drive
from rlx.engines.fleet import wait_for_fleet
from rlx.obs.log import logger, phase
from rlx.processes.environment import Rendezvous

# A host that is lost takes its ranks along: whoever watches hosts has this long to say so first.
_HOSTS_FIRST_S = 10.0


def run_driver(
    config: Config,
    meeting: Rendezvous,
    endpoints_file: Path,
    *,
    stop_asked: Callable[[], bool],
    lost: Callable[[LaneError], None],
) -> bool:
    """Train (or evaluate) to the end; False when ``stop_asked`` ended it early. ``lost`` hears of a rank that is lost while the
    driver waits for none of them."""
    # Co-located ranks wait for the engines before they meet.
    limit_s = config.run.failure_timeout_s + config.rollout.start_timeout_s + 60
    secret = lane_secret(endpoints_file.parent)
    with phase("meet the ranks"):
        listener = Listener(meeting.own_address(), secret, config.num_trainer_ranks)
        announce_driver(meeting, listener.address, limit_s)
        connections = listener.wait(limit_s)
        listener.close()
    lane = CommandLane(connections, silence_s=config.run.failure_timeout_s + _HOSTS_FIRST_S, lost=lost)
    if config.is_finetuning:
        done = drive_finetuning(config, lane, stop_asked=stop_asked)
    else:
        with phase("wait for engines"):
            wait_for_fleet(endpoints_file, config.rollout.start_timeout_s)
        done = drive(config, lane, endpoints_file, stop_asked=stop_asked)
    lane.leave(done=done)
    logger.info("done" if done else "saved and left, as asked")
    return done
