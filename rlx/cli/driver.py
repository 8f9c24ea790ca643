"""The driver of a run that a launcher prepared: ``python -m rlx.cli.driver RUN_DIR --endpoints-file FILE``.

It does no rank's work: it asks for rollouts, has them scored, and tells the trainer ranks what to do. Exit status: 0 done; 1
failed; 75 saved and left because SIGUSR1 or a file asked.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

from rlx.config.load import load_config
from rlx.obs.log import log_failure, start_log
from rlx.processes.environment import hide_gpus, rendezvous
from rlx.processes.parent_watch import watch_parent
from rlx.processes.stopping import REQUEUE_STATUS, StopRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="the prepared run folder, with config.yaml")
    parser.add_argument("--endpoints-file", type=Path, required=True, help="the launcher's list of engines; waited for")
    parser.add_argument("--parent-pipe", type=int, required=True, help="pipe whose end of file means that the launcher died")
    parser.add_argument("--stop-file", type=Path, help="asks to save and leave once it is there")


def main(args: argparse.Namespace) -> int:
    start_log("driver", 0)
    stop = StopRequest(args.stop_file)
    watch_parent(args.parent_pipe)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    hide_gpus("cpu")  # before torch is imported: all of them are the ranks' and engines'
    try:
        config = load_config(str(args.run_dir / "config.yaml"), [])
        run_driver = import_module("rlx.driver.start").run_driver
        done = run_driver(config, rendezvous(), args.endpoints_file, stop_asked=stop.is_set, lost=_fail)
    except Exception as error:
        _fail(error)
    return 0 if done else REQUEUE_STATUS


def _fail(error: Exception) -> None:
    """Say why and leave at once: the main thread may wait for rollouts, and ranks for each other."""
    log_failure(error)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rlx.cli.driver", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
