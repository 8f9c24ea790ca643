"""The engines of one node of a job whose trainers somebody else starts (torchrun, SLURM).

The same processes, guard and health checks as under the local launcher; ``tick`` is called now and then by the owner.
When all of a node's engines are healthy their URLs appear in ``RUN_DIR/engines-NODE.json``; the node of rank 0 puts the
parts together.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rlx.cluster.causes import Cause, Ended, cause_of
from rlx.cluster.engines import EngineStart, write_endpoints
from rlx.cluster.guard import Guard
from rlx.cluster.local import child_environment, inherited_pipe
from rlx.cluster.processes import LAUNCH_ID, Child, ChildSpec, stop_all
from rlx.cluster.rundir import ENDPOINTS, log_path
from rlx.cluster.seats import Seats
from rlx.cluster.supervisor import now_text
from rlx.config.schema import Config
from rlx.obs.log import Phase, last_phase
from rlx.rollout.server import engine_command

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

    def __init__(self, config: Config, run_dir: Path, node: Node, gpus_of: Mapping[int, tuple[int, ...]]) -> None:
        self._run_dir = run_dir
        self._id = uuid.uuid4().hex
        self._open = ExitStack()
        pipe = self._open.enter_context(inherited_pipe())
        commands = {index: self._command(config, index, node, pipe) for index in gpus_of}
        env = _environment(config, self._id, node)
        self._guard = Guard(
            launch_id=self._id,
            launcher_pid=os.getpid(),
            log=log_path(run_dir, "trainer", 0),
            env={name: value for name, value in env.items() if name != LAUNCH_ID},
        )
        self._open.callback(self._guard.dismiss)
        self._engines = [self._spawn(index, command, env, (gpus_of[index], pipe)) for index, command in commands.items()]
        part = part_path(run_dir, node.number)
        self._start = EngineStart(self._engines, part, timeout_s=config.rollout.start_timeout_s, host=node.address)
        self._open.callback(self._start.cancel)

    def tick(self) -> Cause | None:
        """Announce the engines once they are healthy; the cause when one is not, or has ended."""
        self._last_look = now_text()
        for engine in self._engines:
            if engine.poll() is not None:
                return cause_of(self._ended(engine))
        self._start.serving()
        return self._start.failed()

    def stop(self) -> list[int]:
        """End them all; the numbers of those that could not be ended."""
        left = stop_all(self._engines, self._id)
        self._open.close()
        return left

    def _command(self, config: Config, index: int, node: Node, pipe: int) -> list[str]:
        command = engine_command(config, index=index, port=0, python=sys.executable, parent_pipe=pipe)
        # A signal that asks the trainers to save may reach every process of a job.
        return ["env", "--ignore-signal=USR1", *command, "--host", node.address]

    def _spawn(self, index: int, command: list[str], env: Mapping[str, str], seat: tuple[tuple[int, ...], int]) -> Child:
        gpus, pipe = seat
        path = log_path(self._run_dir, "engine", index)
        own = dict(env) | ({"CUDA_VISIBLE_DEVICES": _visible(gpus)} if gpus else {})
        child = Child(ChildSpec(role="engine", rank=index, argv=command, env=own, log_path=path, pass_fds=(pipe,)))
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
            phase=own if own.step >= 0 or not self._start.serving() else Phase(name="serve"),
        )


class Assembly:
    """On rank 0's node: from the nodes' parts to ``RUN_DIR/engines.json``, which all trainer ranks wait for."""

    def __init__(self, run_dir: Path, seats: Seats) -> None:
        self._run_dir = run_dir
        self._numbers = {node: list(seats.engines_of(node)) for node in range(seats.machines.nodes) if seats.engines_of(node)}
        self._written = False

    def tick(self) -> None:
        """Write the list once every part is there."""
        parts = {node: part_path(self._run_dir, node) for node in self._numbers}
        if self._written or not all(part.exists() for part in parts.values()):
            return
        urls: dict[int, str] = {}
        for node, part in parts.items():
            urls |= dict(zip(self._numbers[node], json.loads(part.read_text()), strict=True))
        write_endpoints(self._run_dir / ENDPOINTS, [urls[index] for index in sorted(urls)])
        self._written = True


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
