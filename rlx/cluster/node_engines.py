"""The engines of one node of a job whose trainers somebody else starts (torchrun, SLURM).

The same processes, guard and health checks as under the local launcher; ``tick`` is called now and then by the owner.
When all of a node's engines are healthy their URLs appear in ``RUN_DIR/engines-NODE.json``; the node of rank 0 puts the
parts together.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rlx.cluster.causes import Cause, Ended, cause_of
from rlx.cluster.engines import EnginePlan, Engines
from rlx.cluster.fleet import Fleet, read_fleet, run_keys, write_fleet
from rlx.cluster.guard import Guard
from rlx.cluster.local import child_environment, inherited_pipe
from rlx.cluster.placement import EngineSite, plan_engine
from rlx.cluster.processes import LAUNCH_ID, Child, ChildSpec, stop_all
from rlx.cluster.rundir import ENDPOINTS, log_path
from rlx.cluster.supervisor import now_text
from rlx.config.schema import Config
from rlx.obs.log import Phase, last_phase, logger

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
    """``number`` in the plan, and the address by which the other nodes reach this one."""

    number: int
    address: str


class NodeEngines:
    """Starts at once. Raises ValueError for settings that no engine can be started with, with nothing started."""

    def __init__(
        self, config: Config, run_dir: Path, node: Node, gpus_of: Mapping[int, tuple[int, ...]], *, incarnation: int = 0
    ) -> None:
        self._run_dir = run_dir
        self._id = uuid.uuid4().hex
        self._open = ExitStack()
        pipe = self._open.enter_context(inherited_pipe())
        env = _environment(config, self._id, node)
        keys = run_keys(run_dir)

        def plan(index: int) -> EnginePlan:
            gpus = tuple(_visible(gpus_of[index]).split(",")) if gpus_of[index] else ()
            site = EngineSite(index=index, run_dir=run_dir, parent_pipe=pipe, env=env, keys=keys, host=node.address, gpus=gpus)
            found = plan_engine(config, site)
            # A signal that asks the trainers to save may reach every process of a job.
            return replace(found, argv=["env", "--ignore-signal=USR1", *found.argv])

        for index in gpus_of:
            plan(index)
        self._guard = Guard(
            launch_id=self._id,
            launcher_pid=os.getpid(),
            log=log_path(run_dir, "trainer", 0),
            env={name: value for name, value in env.items() if name != LAUNCH_ID},
        )
        self._open.callback(self._guard.dismiss)
        self._engines = Engines(
            config,
            keys,
            part_path(run_dir, node.number),
            plan=plan,
            spawn=lambda index, found: self._spawn(index, found, pipe),
            say=lambda text: logger.info("%s", text),
        )
        self._open.callback(self._engines.cancel)
        self._engines.start(gpus_of, incarnation)

    def tick(self) -> Cause | None:
        """Announce the engines once they are healthy; the cause when one is not, or has ended."""
        self._last_look = now_text()
        for engine in self._engines.children():
            if engine.poll() is not None and not self._engines.forgives(engine):
                return cause_of(self._ended(engine))
        self._engines.tick()
        return self._engines.failed()

    def stop(self) -> list[int]:
        """End them all; the numbers of those that could not be ended."""
        left = stop_all(self._engines.all_children(), self._id)
        self._open.close()
        return left

    def _spawn(self, index: int, plan: EnginePlan, pipe: int) -> Child:
        path = log_path(self._run_dir, "engine", index)
        spec = ChildSpec(role="engine", rank=index, argv=tuple(plan.argv), env=plan.env, log_path=path, pass_fds=(pipe,))
        child = Child(spec)
        self._guard.add(child.pid)
        return child

    def _ended(self, engine: Child) -> Ended:
        log, code = engine.log_text(), engine.poll()
        assert code is not None
        own = last_phase(log)
        return Ended(
            role="engine",
            rank=engine.spec.rank,
            returncode=code,
            seen_alive=self._last_look,
            seen_ended=now_text(),
            log=log,
            log_path=engine.spec.log_path,
            phase=own if own.step >= 0 or not self._engines.serving() else Phase(name="serve"),
        )


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


def _environment(config: Config, launch_id: str, node: Node) -> dict[str, str]:
    env = child_environment(config, launch_id, num_engines=config.rollout.num_engines)
    if not node.address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
        env.pop("GLOO_SOCKET_IFNAME", None)
    return {name: value for name, value in env.items() if name not in _RANK_VARIABLES and not name.startswith("TORCHELASTIC_")}


def _visible(gpus: tuple[int, ...]) -> str:
    """The node's GPUs by the names that this process was given them under."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else None
    return ",".join(str(gpu) if names is None else names[gpu] for gpu in gpus)
