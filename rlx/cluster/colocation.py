"""Engines on the trainers' GPUs: what they give back while the trainers work, and making them do so before any model is built."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from rlx.engines.fleet import Fleet
from rlx.obs.log import notice, phase
from rlx.parallel.context import ParallelContext
from rlx.parallel.memory import GIB, device_used
from rlx.rollout.sglang.control import EngineControl
from rlx.sync.engine_memory import EngineMemory
from rlx.sync.group import Endpoint, Engine


def clear_devices(tags: Sequence[str], context: ParallelContext, fleet: Fleet, timeout_s: float) -> EngineMemory:
    """Let all engines give back their memory (``tags`` of it, each within the time); on rank 0, whose record is the one that
    counts. Collective.

    Raises on every rank when an engine cannot.
    """
    memory = EngineMemory(tags)
    error: Exception | None = None
    with phase("clear devices"):
        before = device_used(context.device)
        if context.rank == 0:
            try:
                for member in fleet.members:
                    endpoint = Endpoint(url=member.url, tp=member.tp, incarnation=member.incarnation, index=member.index)
                    with closing(EngineControl(member.url, timeout_s=timeout_s, keys=fleet.keys)) as control:
                        memory.release(Engine(endpoint=endpoint, control=control))
            except Exception as caught:  # the other ranks wait to hear of it
                error = caught
        context.raise_together(error)
        after = device_used(context.device)
        given = " and ".join(memory.tags) or "nothing"
        sizes = f": {before / GIB:.2f} GiB, then {after / GIB:.2f} GiB" if context.device.type == "cuda" else ""
        notice(f"memory of the engines: they give back {given} while trainers work{sizes}")
    return memory
