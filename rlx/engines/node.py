"""The engines of one node of a job whose trainers somebody else starts (torchrun, SLURM, Ray), and its parts of engines that
span several nodes.

The same processes, guard and health checks as under the local launcher; ``tick`` is called now and then by the owner.
When all engines that a node leads are healthy their URLs appear in ``RUN_DIR/engines-NODE.json``; the node of rank 0 puts
these lists together.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rlx.config.parts import EngineSettings
from rlx.engines.engine_plan import EngineSite, plan_engine
from rlx.engines.fleet import (
    Fleet,
    read_fleet,
    run_keys,
    write_fleet,
)
from rlx.engines.manager import EnginePlan, Engines
from rlx.engines.spanning import Follower, SpanningChild
from rlx.obs.log import Phase, logger
from rlx.placement.seats import EnginePart
from rlx.processes.causes import Cause, Ended, cause_of
from rlx.processes.child_environment import child_environment, inherited_pipe
from rlx.processes.children import (
    Child,
    ChildSpec,
    stop_all,
)
from rlx.processes.orphan_guard import Guard
from rlx.processes.rundir import ENDPOINTS, log_path
from rlx.processes.supervisor import Exit, ended, now_text
from rlx.rollout.sglang.server import Span
from rlx.sync.ports import free_port

# A server that inherited these would take itself for one of the trainer ranks.
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ROLE_RANK",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """``number`` in the plan, the address by which the other nodes reach this one, and how many engines it holds in all."""

    number: int
    address: str
    num_engines: int


class NodeEngines:
    """``parts``: engine number -> what this node holds of it. Starts at once. Raises ValueError for settings that no engine
    can be started with, with nothing started."""

    def __init__(
        self, engines: EngineSettings, run_dir: Path, node: Node, parts: Mapping[int, EnginePart], *, incarnation: int = 0
    ) -> None:
        self._settings, self._run_dir, self._node, self._parts = engines, run_dir, node, parts
        self._id = uuid.uuid4().hex
        self._open = ExitStack()
        self._pipe = self._open.enter_context(inherited_pipe())
        self._env = _environment(engines, self._id, node)
        self._keys = run_keys(run_dir)
        for index in parts:
            self._plan(index)
        self._guard = Guard(
            launch_id=self._id,
            launcher_pid=os.getpid(),
            log=log_path(run_dir, "driver", 0),
            env=self._env,
        )
        self._open.callback(self._guard.dismiss)
        self._engines = Engines(
            engines,
            self._keys,
            part_path(run_dir, node.number),
            plan=self._plan,
            spawn=self._spawn,
            say=lambda text: logger.info("%s", text),
        )
        self._open.callback(self._engines.cancel)
        self._engines.start([index for index, part in parts.items() if not part.rank], incarnation)
        self._followers = [
            Follower(run_dir, index, part.rank, partial(self._start, index)) for index, part in parts.items() if part.rank
        ]

    def tick(self) -> Cause | None:
        """Announce the engines once they are healthy; the cause when one is not, or has ended."""
        self._last_look = now_text()
        for engine in self._engines.children():
            if engine.poll() is not None and not self._engines.forgives(engine):
                return cause_of(self._ended(engine))
        self._engines.tick()
        for follower in self._followers:
            follower.tick()
        return self._engines.failed()

    def log_of(self, cause: Cause) -> str:
        """What the process that is to blame wrote."""
        logs = [engine.log_text() for engine in self._engines.children() if engine.spec.log_path == cause.log_path]
        return logs[-1] if logs else ""

    def stop(self) -> list[int]:
        """End them all; the numbers of those that could not be ended."""
        followers = [child for follower in self._followers for child in follower.children()]
        left = stop_all([*self._engines.all_children(), *followers], self._id)
        self._open.close()
        return left

    def _plan(self, index: int, address: str | None = None) -> EnginePlan:
        """``address`` is where the parts of an engine on several nodes meet; without one a port of this node is taken."""
        part, host = self._parts[index], self._node.address
        span = None
        if part.num_nodes > 1:
            span = Span(rank=part.rank, num_nodes=part.num_nodes, address=address or f"{host}:{free_port(host)}")
        site = EngineSite(
            index=index,
            run_dir=self._run_dir,
            parent_pipe=self._pipe,
            env=self._env,
            keys=self._keys,
            host=host,
            gpus=tuple(_visible(part.gpus).split(",")) if part.gpus else (),
            span=span,
        )
        found = plan_engine(self._settings, site)
        # A signal that asks the trainers to save may reach every process of a job.
        return replace(found, argv=["env", "--ignore-signal=USR1", *found.argv])

    def _start(self, index: int, address: str) -> Child:
        return self._spawn(index, self._plan(index, address))

    def _spawn(self, index: int, plan: EnginePlan) -> Child:
        path = log_path(self._run_dir, "engine", index, self._parts[index].rank)
        spec = ChildSpec(role="engine", rank=index, argv=tuple(plan.argv), env=plan.env, log_path=path, pass_fds=(self._pipe,))
        leads = plan.span is not None and not plan.span.rank
        child = SpanningChild(spec, self._run_dir, plan.span) if plan.span and leads else Child(spec)
        self._guard.add(child.pid)
        return child

    def _ended(self, engine: Child) -> Ended:
        code = engine.poll()
        assert code is not None
        found = ended(engine, Exit(code, self._last_look, now_text()))
        return found if found.phase.step >= 0 or not self._engines.serving() else replace(found, phase=Phase(name="serve"))


class Assembly:
    """From the parts that ``nodes`` announce to ``RUN_DIR/engines.json``, which all trainer ranks wait for."""

    def __init__(self, run_dir: Path, nodes: Sequence[int]) -> None:
        self._run_dir, self._nodes = run_dir, nodes
        self._written: Fleet | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all parts were there."""
        return self._written is not None

    def tick(self) -> None:
        """Write the list once every part is there, and again whenever one has changed."""
        paths = [part_path(self._run_dir, node) for node in self._nodes]
        if not all(path.exists() for path in paths):
            return
        parts = [read_fleet(path) for path in paths]
        members = sorted((member for part in parts for member in part.members), key=lambda member: member.index)
        held = tuple(one for part in parts for one in part.held)
        restarts = sum(part.num_restarts for part in parts)
        fleet = Fleet(members=tuple(members), held=held, keys=parts[0].keys, num_restarts=restarts)
        if fleet != self._written:
            write_fleet(self._run_dir / ENDPOINTS, fleet)
            self._written = fleet


def part_path(run_dir: Path, node: int) -> Path:
    """Where a node announces its engines."""
    return run_dir / f"engines-{node}.json"


def _environment(engines: EngineSettings, launch_id: str, node: Node) -> dict[str, str]:
    all_here = node.address.startswith("127.") and not engines.rollout.endpoints
    env = child_environment(engines.cluster, launch_id, num_peers=node.num_engines, all_here=all_here)
    return {name: value for name, value in env.items() if name not in _RANK_VARIABLES and not name.startswith("TORCHELASTIC_")}


def _visible(gpus: tuple[int, ...]) -> str:
    """The node's GPUs by the names that this process was given them under."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else None
    return ",".join(str(gpu) if names is None else names[gpu] for gpu in gpus)
