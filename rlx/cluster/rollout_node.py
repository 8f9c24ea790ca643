"""A node that holds engines only, in a job whose trainers torchrun starts on other nodes.

It meets them at torchrun's store, starts the engines that the plan seats here and serves until rank 0 says that the run
is over or the store is gone, which is the end of the trainers' node.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

from rlx.cluster.causes import shown_log
from rlx.cluster.environment import RolloutNode, default_interface, rollout_node
from rlx.cluster.node_engines import Node, NodeEngines
from rlx.cluster.pulse import Pulse
from rlx.cluster.seating import machines_of, seats_of
from rlx.cluster.stopping import end_on_signals
from rlx.cluster.torchrun import END_KEY, agreed_run, meet
from rlx.config.load import load_config

_LOOK_S = 0.5


def serve_node() -> int:
    """Serve to the end of the run; the exit status. Must be called in the main thread."""
    place: RolloutNode = rollout_node()
    store = meet(place.meeting, rank=-1)
    run_dir = agreed_run(store, place.meeting)
    config = load_config(str(run_dir / "config.yaml"), [])
    seats = seats_of(config, machines_of(config, trainer_nodes=place.trainer_nodes))
    number = place.trainer_nodes + place.number
    parts = seats.parts_of(number)
    if not parts:
        return 0
    default_interface(place.meeting.own_address())
    asked = threading.Event()
    end_on_signals(lambda signal_number: asked.set())
    pulse = Pulse(store, number, range(seats.machines.nodes), run=place.meeting.attempt, end=END_KEY)
    pulse.start()
    engines = NodeEngines(config, run_dir, Node(number=number, address=place.meeting.own_address()), parts)
    try:
        while not asked.is_set():
            cause = engines.tick()
            if cause is not None:
                print(*shown_log(cause, engines.log_of(cause)), sep="\n", file=sys.stderr)
                print(f"rlx: FAILED {cause.role} rank {cause.rank} on {socket.gethostname()}", file=sys.stderr)
                print(f"rlx: cause: {cause.cause}\nrlx: logs: {cause.log_path}", file=sys.stderr, flush=True)
                return 1
            lost = pulse.lost(config.run.failure_timeout_s)
            if lost is not None:
                print(f"rlx: FAILED engines on {socket.gethostname()}\nrlx: cause: {lost}", file=sys.stderr, flush=True)
                return 1
            if pulse.is_over:
                return 0
            time.sleep(_LOOK_S)
        return 0
    finally:
        engines.stop()
        pulse.stop()
