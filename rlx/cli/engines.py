"""``python -m rlx.cli.engines``: the engines of a node that trains nothing; started by the job, once on each such node.

NODE_RANK counts these nodes, NNODES is the number of trainer nodes, MASTER_ADDR and MASTER_PORT are torchrun's. The run
and its settings come from rank 0; the configuration on the command line is there to be read by people.
"""

from __future__ import annotations

import argparse
import signal
import sys

from rlx.cluster.rollout_node import serve_node
from rlx.obs.log import start_log


def main() -> int:
    """Exit status: 0 the run is over, 1 an engine failed, 2 the trainers refused the configuration."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="rlx.cli.engines", description=__doc__)
    parser.add_argument("config", nargs="*", help="configuration and overrides, as given to the trainers")
    parser.parse_args()
    start_log("engines", 0)
    return serve_node()


if __name__ == "__main__":
    sys.exit(main())
