"""One machine: the driver, the trainer ranks and the engines as child processes of this one.

All start at the same time, so that models load side by side; trainers find the engines through
``RUN_DIR/engines.json``, which appears once all engines are healthy and lists those that serve now.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rlx.cluster.driver import StopFile, driver_command
from rlx.cluster.launch import OpenRun
from rlx.config.load import ConfigError
from rlx.config.parts import EngineSettings
from rlx.engines.engine_plan import (
    EngineSite,
    attached_fleet,
    check_placement,
    plan_engine,
)
from rlx.engines.fleet import run_keys, write_fleet
from rlx.engines.manager import EnginePlan, Engines
from rlx.obs.log import last_phase
from rlx.processes.causes import Cause, is_port_taken
from rlx.processes.child_environment import child_environment, inherited_pipe
from rlx.processes.children import (
    Child,
    ChildSpec,
    stop_all,
)
from rlx.processes.orphan_guard import Guard
from rlx.processes.rundir import ENDPOINTS, log_path
from rlx.processes.supervisor import NoEngines, Outcome, Supervisor
from rlx.processes.threads import thread_variables
from rlx.rollout.keys import EngineKeys
from rlx.sync.ports import free_port

_MAX_PORT_RETRIES = 2


def trainer_command(run_dir: Path, endpoints_file: Path, parent_pipe: int) -> list[str]:
    """The command line of every trainer rank; the environment says which rank it is."""
    worker = [sys.executable, "-m", "rlx.cli.worker", str(run_dir)]
    return [*worker, "--endpoints-file", str(endpoints_file), "--parent-pipe", str(parent_pipe)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """What to run as the driver, as a trainer rank and as an engine."""

    driver: Callable[[Path, Path, int, Path], Sequence[str]] = driver_command
    trainer: Callable[[Path, Path, int], Sequence[str]] = trainer_command
    engine: Callable[[EngineSettings, EngineSite], EnginePlan] = plan_engine


class LocalLaunch:
    """The processes of one run, from start to stop. ConfigError, with nothing started, for settings of engines that cannot be
    used here."""

    def __init__(self, engines: EngineSettings, run: OpenRun, programs: Programs = Programs()) -> None:
        self._settings, self._programs, self._failure_timeout_s = engines, programs, run.failure_timeout_s
        self._run_dir, self._progress, self._interrupts = run.run_dir, run.progress, run.interrupts
        self._id = uuid.uuid4().hex
        self._stop_file = StopFile(run.run_dir, run.interrupts.ask_to_save)
        all_here = not engines.rollout.endpoints
        self._env = child_environment(engines.cluster, self._id, num_peers=engines.num_started, all_here=all_here)
        self._open = ExitStack()
        self._open.callback(self._stop_file.remove)
        self._driver: Child | None = None
        self._trainers: list[Child] = []
        self._engines: Engines | None = None

    @property
    def described(self) -> str:
        """What was started, in words."""
        parts = [f"{self._settings.num_trainer_ranks} trainer rank(s)", f"{self._settings.num_started} engine(s)"]
        return " and ".join(parts if self._settings.num_started else parts[:1])

    def host_of(self, cause: Cause) -> None:
        """There is one."""

    def log_of(self, cause: Cause) -> str:
        """What the process that is to blame wrote."""
        logs = [child.log_text() for child in self._children() if child.spec.log_path == cause.log_path]
        return logs[-1] if logs else ""

    def run(self) -> Outcome:
        """Start everything and watch until it is over; trainers that found their port taken are started again."""
        self._parent_pipe = self._open.enter_context(inherited_pipe())
        keys = run_keys(self._run_dir)
        self._check_engines(keys)
        log = log_path(self._run_dir, "driver", 0)
        self._guard = Guard(launch_id=self._id, launcher_pid=os.getpid(), log=log, env=self._env)
        self._open.callback(self._guard.dismiss)
        self._progress.say(f"starting {self.described}; run folder: {self._run_dir}")
        if self._settings.num_started:
            self._start_engines(keys)
        else:
            write_fleet(self._run_dir / ENDPOINTS, attached_fleet(self._settings.rollout))
        for retries_left in range(_MAX_PORT_RETRIES, -1, -1):
            outcome = self._run_trainers()
            if not retries_left or not self._failed_on_port(outcome):
                break
            stop_all(self._workers(), hurry=self._interrupts.is_urgent)
            self._progress.say("the trainers' port was taken by another program; starting them again with a new one")
        return outcome

    def stop(self) -> str:
        """End all processes; those that could not be ended, in words."""
        left = stop_all(self._children(), self._id, hurry=self._interrupts.is_urgent)
        self._open.close()
        return f"{sorted(left)}: stuck in the kernel" if left else ""

    def _children(self) -> list[Child]:
        return [*self._workers(), *(() if self._engines is None else self._engines.all_children())]

    def _workers(self) -> list[Child]:
        return [*(() if self._driver is None else (self._driver,)), *self._trainers]

    def _run_trainers(self) -> Outcome:
        port = free_port()
        self._trainers = []
        self._driver = self._spawn_worker("driver", 0, port)
        for rank in range(self._settings.num_trainer_ranks):
            self._trainers.append(self._spawn_worker("trainer", rank, port))
        supervisor = Supervisor(
            self._workers(),
            NoEngines() if self._engines is None else self._engines,
            interrupted=self._interrupts.is_set,
            tick=self._tick,
        )
        return supervisor.watch(leave_timeout_s=self._failure_timeout_s)

    def _tick(self) -> None:
        if self._stop_file.hand_on():
            self._progress.say(self._interrupts.promise)
        if self._engines is not None:
            self._engines.tick()
        self._progress.tick()

    def _failed_on_port(self, outcome: Outcome) -> bool:
        """Whoever is to blame: one that reached the stranger on that port may have failed before rank 0."""
        if outcome.cause is None or outcome.cause.role not in ("driver", "trainer"):
            return False
        ranks = [trainer.log_text() for trainer in self._trainers]
        logs = [child.log_text() for child in self._workers()]
        return any(is_port_taken(log) for log in logs) and all(last_phase(log).step < 0 for log in ranks)

    def _site(self, index: int, keys: EngineKeys) -> EngineSite:
        return EngineSite(index=index, run_dir=self._run_dir, parent_pipe=self._parent_pipe, env=self._env, keys=keys)

    def _check_engines(self, keys: EngineKeys) -> None:
        """Raises ConfigError for settings that no trainer or engine can be started with here."""
        try:
            check_placement(self._settings)
            for index in range(self._settings.num_started):
                self._programs.engine(self._settings, self._site(index, keys))
        except ValueError as error:
            raise ConfigError([str(error)]) from error

    def _start_engines(self, keys: EngineKeys) -> None:
        self._engines = Engines(
            self._settings,
            keys,
            self._run_dir / ENDPOINTS,
            plan=lambda index: self._programs.engine(self._settings, self._site(index, keys)),
            spawn=lambda index, plan: self._spawn("engine", index, plan.argv, plan.env),
            say=self._progress.say,
        )
        self._open.callback(self._engines.cancel)
        self._engines.start(range(self._settings.num_started))

    def _spawn_worker(self, role: str, rank: int, port: int) -> Child:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._settings.num_trainer_ranks, "MASTER_PORT": port}
        env = self._env | {name: str(number) for name, number in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
        place = (self._run_dir, self._run_dir / ENDPOINTS, self._parent_pipe)
        if role == "driver":
            return self._spawn(role, rank, self._programs.driver(*place, self._stop_file.path), env)
        threads = thread_variables(self._settings.cluster.threads_per_rank, os.environ, self._settings.num_trainer_ranks)
        return self._spawn(role, rank, self._programs.trainer(*place), env | threads)

    def _spawn(self, role: str, rank: int, argv: Sequence[str], env: Mapping[str, str]) -> Child:
        path = log_path(self._run_dir, role, rank)
        child = Child(ChildSpec(role=role, rank=rank, argv=tuple(argv), env=env, log_path=path, pass_fds=(self._parent_pipe,)))
        self._guard.add(child.pid)
        return child
