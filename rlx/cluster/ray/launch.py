"""A run on a Ray cluster: trainer ranks and engines are actors in one placement group, watched from here.

The launcher is Ray's driver process; rlx's own driver is its child. A keeper on every node of the plan answers for its host. The
run folder must be on a file system that all nodes see: logs, metrics and the list of engines are read there.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlx.cluster.driver import DriverProcess
from rlx.cluster.launch import OpenRun
from rlx.cluster.ray.actors import (
    EngineActor,
    Host,
    Job,
    Keeper,
    TrainerActor,
)
from rlx.cluster.ray.address import RayAddress
from rlx.cluster.ray.cluster import (
    Interrupted,
    RayCluster,
    Room,
    actor_environment,
)
from rlx.cluster.ray.watch import (
    ActorChild,
    ActorSpec,
    HostWatch,
    RayEngines,
)
from rlx.config.load import ConfigError
from rlx.config.parts import EngineSettings
from rlx.engines.engine_plan import attached_fleet
from rlx.engines.fleet import write_fleet
from rlx.obs.log import Phase
from rlx.placement.from_config import check_spanning
from rlx.placement.ray_nodes import LackError, bundles_of
from rlx.placement.seats import Demand, PlacementError, Seats, picture
from rlx.processes.causes import Cause
from rlx.processes.children import LAUNCH_ID
from rlx.processes.environment import RankEnvironment
from rlx.processes.orphan_guard import Guard
from rlx.processes.rundir import ENDPOINTS, log_path
from rlx.processes.supervisor import (
    NoEngines,
    Outcome,
    Supervisor,
    Watched,
    now_text,
)

_START_S = 300.0
_STOP_S = 12.0
_PROBE_S = 5.0


class RayLaunch:
    """The actors of one run, from start to stop. ConfigError, with nothing left, for a plan that no such cluster holds."""

    described = ""

    def __init__(self, engines: EngineSettings, demand: Demand, address: RayAddress, run: OpenRun) -> None:
        self._settings, self._demand, self._address, self._run_dir = engines, demand, address, run.run_dir
        self._progress, self._interrupts, self._failure_timeout_s = run.progress, run.interrupts, run.failure_timeout_s
        env = actor_environment(engines.cluster, os.environ)
        self._job = Job(id=uuid.uuid4().hex, run_dir=run.run_dir, folder=os.getcwd(), env=env)
        self._open = ExitStack()
        self._cluster: RayCluster | None = None
        self._keepers: list[tuple[Host, Any]] = []
        self._hosts: HostWatch | None = None
        self._driver: DriverProcess | None = None
        self._trainers: list[ActorChild] = []
        self._engines: RayEngines | None = None

    def host_of(self, cause: Cause) -> str | None:
        """Where the one to blame ran; the driver runs here."""
        if cause.role == "driver":
            return socket.gethostname()
        found = [child for child in self._children() if child.spec.log_path == cause.log_path]
        return found[-1].spec.host.name if found else None

    def log_of(self, cause: Cause) -> str:
        """What the one to blame wrote."""
        workers: list[Watched] = [] if self._driver is None else [self._driver.child]
        found = [child for child in [*workers, *self._children()] if child.spec.log_path == cause.log_path]
        return found[-1].log_text() if found else ""

    def run(self) -> Outcome:
        """Start everything and watch until it is over."""
        try:
            return self._run()
        except Interrupted:
            return Outcome(interrupted=True)
        except PlacementError as error:
            raise ConfigError([str(error)]) from error
        except (LackError, RayError, OSError) as error:
            told: BaseException = error.cause if isinstance(error, RayTaskError) else error
            return Outcome(cause=self._own_cause(str(told) or type(told).__name__))

    def stop(self) -> str:
        """End all actors, what they started, and the reservation; what could not be ended, in words."""
        engines = [] if self._engines is None else [child.handle for child in self._engines.children()]
        if not self._interrupts.is_urgent():
            _answers([engine.stop.remote() for engine in engines], _STOP_S)
        for child in self._children():
            with suppress(RayError):
                ray.kill(child.handle)
        calls = []
        for host, keeper in self._keepers:
            others = tuple(other.keeper for other, _ in self._keepers if other.name == host.name)
            calls.append(keeper.end_leftovers.remote(others))
        found = _answers(calls, _STOP_S)
        left = [
            f"{numbers} on {host.name}" if numbers is not None else f"unknown on {host.name}, which does not answer"
            for (host, _), numbers in zip(self._keepers, found, strict=True)
            if numbers is None or numbers
        ]
        self._open.close()
        return "; ".join(left)

    def _children(self) -> list[ActorChild]:
        return [*self._trainers, *(() if self._engines is None else self._engines.children())]

    def _run(self) -> Outcome:
        if self._address.is_own:
            self._guard_own_cluster()
        self._cluster = RayCluster(self._settings.cluster, self._demand, self._address, self._job.id, self._is_unwanted)
        self._open.callback(self._cluster.leave)
        room = self._cluster.reserve(self._progress.say)
        self._open.callback(self._cluster.release, room)
        check_spanning(self._settings, room.seats)
        hosts = self._keep_hosts(room)
        self._tell(room.seats, hosts)
        self._hosts = HostWatch(self._keepers)
        if self._settings.num_started:
            self._start_engines(room, hosts)
        else:
            write_fleet(self._run_dir / ENDPOINTS, attached_fleet(self._settings.rollout))
        self._start_trainers(room, hosts)
        engines = NoEngines() if self._engines is None else self._engines
        assert self._driver is not None
        supervisor = Supervisor(
            [self._driver.child, *self._trainers], engines, interrupted=self._interrupts.is_set, tick=self._tick
        )
        return self._with_lost_host(supervisor.watch(leave_timeout_s=self._failure_timeout_s))

    def _is_unwanted(self) -> bool:
        """Whether to end a run that has not begun: there is nothing to save yet."""
        return self._interrupts.is_set() or self._interrupts.ask_to_save()

    def _guard_own_cluster(self) -> None:
        """A cluster of our own ends with this process, however that ends; the guard makes sure of it and tells the terminal.
        Two helpers of Ray's hide from it (their titles overwrite their environment) and leave by themselves within minutes."""
        env = dict(os.environ)
        log = log_path(self._run_dir, "driver", 0)
        guard = Guard(launch_id=self._job.id, launcher_pid=os.getpid(), log=log, env=env)
        self._open.callback(guard.dismiss)
        os.environ[LAUNCH_ID] = self._job.id  # what Ray starts here inherits it

    def _tell(self, seats: Seats, hosts: Sequence[Host]) -> None:
        counts = f"{seats.trainer_ranks} trainer rank(s) and {len(seats.engines)} engine(s)"
        self._progress.say(f"{counts} on the Ray cluster {self._address.name}; run folder: {self._run_dir}")
        for line in picture(seats):
            self._progress.say(line)
        names = ", ".join(f"{number} {host.name}" for number, host in enumerate(hosts[:16]))
        self._progress.say(f"nodes: {names}{' ...' if len(hosts) > 16 else ''}")

    def _keep_hosts(self, room: Room) -> list[Host]:
        """A keeper on every node; all of them see the working folder and the run folder."""
        assert self._cluster is not None
        keepers = []
        for node, bundle in enumerate(bundles_of(self._settings.cluster, room.seats)):
            place = _in_bundle(room, node, num_cpus=0, num_gpus=bundle.get("GPU", 0))
            keepers.append(_actor(Keeper, place).remote(self._job))
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        found = self._cluster.wait_for([keeper.look.remote() for keeper in keepers], _START_S, "the keepers of the nodes")
        # In a cluster of our own everybody is here: listen to nobody outside.
        hosts = [
            replace(
                host,
                address="127.0.0.1" if self._address.is_own else addresses[host.ray_id],
                num_engines=len(room.seats.parts_of(node)),
            )
            for node, host in enumerate(found)
        ]
        self._keepers = list(zip(hosts, keepers, strict=True))
        return hosts

    def _start_engines(self, room: Room, hosts: Sequence[Host]) -> None:
        seats = room.seats.engines

        def make(index: int, rank: int, incarnation: int) -> ActorChild:
            node = seats[index].nodes[rank]
            host, part = hosts[node], room.seats.parts_of(node)[index]
            place = _in_bundle(room, node, num_cpus=self._threads, max_concurrency=2)
            handle = _actor(EngineActor, place).remote(self._job, host, index, part, incarnation)
            spec = ActorSpec(role="engine", rank=index, log_path=log_path(self._run_dir, "engine", index, rank), host=host)
            return ActorChild(spec, handle, handle.serve.remote)

        nodes_of = [len(seat.nodes) for seat in seats]
        self._engines = RayEngines(self._run_dir, nodes_of, self._settings.rollout.max_restarts, make, self._progress.say)

    def _start_trainers(self, room: Room, hosts: Sequence[Host]) -> None:
        assert self._cluster is not None
        each, world = room.seats.ranks_per_node, room.seats.trainer_ranks
        handles = []
        for rank in range(world):
            place = RankEnvironment(rank=rank, local_rank=rank % each, world_size=world, ranks_here=min(each, world))
            options = _in_bundle(room, rank // each, num_cpus=self._threads)
            handles.append(_actor(TrainerActor, options).remote(self._job, hosts[rank // each], place))
        [meeting] = self._cluster.wait_for([handles[0].open_store.remote(hosts[0].address)], _START_S, "trainer rank 0")
        world_of = {"MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port), "WORLD_SIZE": str(world)}
        env = {**os.environ, **self._job.env, **world_of, "RANK": "0", "LOCAL_RANK": "0"}
        self._driver = DriverProcess(self._run_dir, env, self._interrupts.ask_to_save)
        self._open.callback(self._driver.stop)
        for rank, handle in enumerate(handles):
            call = partial(handle.run.remote, meeting)
            log = log_path(self._run_dir, "trainer", rank)
            spec = ActorSpec(role="trainer", rank=rank, log_path=log, host=hosts[rank // each])
            self._trainers.append(ActorChild(spec, handle, call))

    @property
    def _threads(self) -> int:
        return self._settings.cluster.threads_per_rank or 1

    def _tick(self) -> None:
        assert self._hosts is not None
        if self._driver is not None and self._driver.stop_file.hand_on():
            self._progress.say(self._interrupts.promise)
        if self._engines is not None:
            self._engines.tick()
        self._hosts.tick()
        limit_s = self._failure_timeout_s
        for host in self._hosts.silent(limit_s):
            for child in self._children():
                if child.spec.host is host:
                    child.give_up(f"host {host.name} ({host.address}) was lost: it has not answered for {limit_s:g} s")
        self._progress.tick()

    def _with_lost_host(self, outcome: Outcome) -> Outcome:
        """A rank that lost its peers may know no more than that; a host that is silent now explains it."""
        assert self._hosts is not None
        cause = outcome.cause
        if cause is None or not cause.consequence:
            return outcome
        self._hosts.settle(_PROBE_S)
        for host in self._hosts.silent(_PROBE_S):
            text = (
                f"host {host.name} ({host.address}) was lost: it no longer answers; trainer rank {cause.rank} says: {cause.cause}"
            )
            blamed = next((child.spec for child in self._trainers if child.spec.host is host), None)
            rank = cause.rank if blamed is None else blamed.rank
            return Outcome(cause=replace(cause, rank=rank, cause=text))
        return outcome

    def _own_cause(self, text: str) -> Cause:
        log = log_path(self._run_dir, "driver", 0)
        return Cause(role="launcher", rank=0, phase=Phase(name="start"), cause=text, log_path=log, when=now_text())


def _in_bundle(room: Room, node: int, **options: Any) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(placement_group=room.group, placement_group_bundle_index=node)
    return options | {"scheduling_strategy": strategy, "max_restarts": 0}


def _actor(cls: type, options: dict[str, Any]) -> Any:
    return ray.remote(cls).options(**options)


def _answers(calls: Sequence[Any], limit_s: float) -> list[Any]:
    """What each call gave within the limit; None for the others."""
    if not calls:
        return []
    done = set(ray.wait(list(calls), num_returns=len(calls), timeout=limit_s)[0])
    found = []
    for call in calls:
        try:
            found.append(ray.get(call) if call in done else None)
        except RayError:
            found.append(None)
    return found
