"""A node that holds engines only, in a job whose trainers torchrun starts on other nodes.

It meets them at torchrun's store, starts what the plan seats here of engines and serves until rank 0 says that the run is
over or the store is gone, which is the end of the trainers' node. When it fails it tells the trainers why.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

from rlx.cluster.torchrun import END_KEY, agreed_run, meet
from rlx.config.load import load_config
from rlx.config.parts import EngineSettings
from rlx.engines.node import Node, NodeEngines
from rlx.placement.from_config import seats_of
from rlx.processes.causes import shown_log
from rlx.processes.environment import RolloutNode, default_interface, rollout_node
from rlx.processes.heartbeat import LastWords, Pulse
from rlx.processes.stopping import end_on_signals

_LOOK_S = 0.5


def serve_node() -> int:
    """Serve to the end of the run; the exit status. Must be called in the main thread."""
    place: RolloutNode = rollout_node()
    store = meet(place.meeting, rank=-1)
    run_dir = agreed_run(store, place.meeting)
    config = load_config(str(run_dir / "config.yaml"), [])
    settings = EngineSettings.of(config)
    seats = seats_of(settings, config.parallel, place.trainer_nodes)
    number = place.trainer_nodes + place.number
    parts = seats.parts_of(number)
    if not parts:
        return 0
    default_interface(place.meeting.own_address())
    asked = threading.Event()
    end_on_signals(lambda signal_number: asked.set())
    pulse = Pulse(store, number, range(seats.machines.nodes), run=place.meeting.attempt, end=END_KEY)
    pulse.start()
    engines: NodeEngines | None = None
    words: LastWords | None = None
    try:
        here = Node(number=number, address=place.meeting.own_address(), num_engines=len(parts))
        engines = NodeEngines(settings, run_dir, here, parts)
        words = _serve(engines, pulse, asked, config.run.failure_timeout_s)
    except (OSError, ValueError) as error:
        words = _words("engines", number, f"{type(error).__name__}: {error}", None)
    finally:
        if engines is not None:
            engines.stop()
        pulse.stop(words)
    if words is None:
        return 0
    print(f"rlx: FAILED {words.role} rank {words.rank} on {words.host}", file=sys.stderr)
    print(f"rlx: cause: {words.cause}\nrlx: logs: {words.log or run_dir / 'logs'}", file=sys.stderr, flush=True)
    return 1


def _serve(engines: NodeEngines, pulse: Pulse, asked: threading.Event, failure_timeout_s: float) -> LastWords | None:
    """Until the run is over or someone asks this node to leave: None; or until something fails, here or elsewhere."""
    while not asked.is_set():
        cause = engines.tick()
        if cause is not None:
            print(*shown_log(cause, engines.log_of(cause)), sep="\n", file=sys.stderr)
            return _words(cause.role, cause.rank, cause.cause, cause.log_path)
        if pulse.last_words is not None:
            return pulse.last_words
        lost = pulse.lost(failure_timeout_s)
        if lost is not None:
            return _words("engines", lost.node, str(lost), None)
        if pulse.is_over:
            return None
        time.sleep(_LOOK_S)
    return None


def _words(role: str, rank: int, cause: str, log: Path | None) -> LastWords:
    return LastWords(host=socket.gethostname(), role=role, rank=rank, cause=cause, log=None if log is None else str(log))
