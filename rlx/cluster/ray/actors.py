"""What runs inside Ray's actors. Plain classes: the launcher makes actors of them.

An actor's process starts with little imported, so that its environment and log are in place before the models' libraries
look at them.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import ray

from rlx.config.load import load_config
from rlx.config.parts import EngineSettings
from rlx.obs.log import log_failure, logger, start_log
from rlx.placement.seats import EnginePart
from rlx.processes.causes import Cause
from rlx.processes.children import JOB_ID, kill_members
from rlx.processes.environment import RankEnvironment, interface_of
from rlx.processes.rundir import ENDPOINTS, log_path, wait_for_shared
from rlx.processes.threads import VARIABLES

_LOOK_S = 0.2
_MEET_S = 300.0
ENGINE_ID = "RLX_ENGINE_ID"
"""Environment variable by which an engine's next life finds what the last one left on its host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all actors of a run share. ``env`` is added to the environment that Ray gives them."""

    id: str
    run_dir: Path
    folder: str
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One node of the plan: its name, Ray's id and address of it, its keeper's process, the GPUs that it holds for us and the
    number of engines there."""

    name: str
    ray_id: str
    keeper: int
    address: str = ""
    gpus: tuple[str, ...] = ()
    num_engines: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the trainer ranks meet."""

    address: str
    port: int


class Keeper:
    """One a node: answers for its host and, at the end, ends what the run left there. Holds the node's GPUs for the
    trainers and engines, which are told theirs by the plan."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def look(self) -> Host:
        """The host, without Ray's address of it. FileNotFoundError when it does not see the working folder or the run folder."""
        _enter(self._job)
        wait_for_shared(self._job.run_dir / "config.yaml")
        ray_context = ray.get_runtime_context()
        gpus = tuple(str(number) for number in ray_context.get_accelerator_ids().get("GPU", ()))
        return Host(name=socket.gethostname(), ray_id=ray_context.get_node_id(), keeper=os.getpid(), gpus=gpus)

    def ping(self) -> None:
        """The host is there."""

    def end_leftovers(self, keepers: tuple[int, ...]) -> list[int]:
        """SIGKILL every process of the job on this host but its keepers; the numbers of those that did not end."""
        return kill_members((), self._job.id, 5.0, variable=JOB_ID, spare=keepers)


class TrainerActor:
    """One trainer rank, as under the other launchers."""

    def __init__(self, job: Job, host: Host, place: RankEnvironment) -> None:
        self._job, self._place = job, place
        _enter(job, host)
        self._store: Any = None

    def open_store(self, address: str) -> Meeting:
        """On rank 0: a store on a port that the system chose, so that nobody else can take it meanwhile."""
        store = import_module("torch.distributed").TCPStore
        self._store = store(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_MEET_S))
        return Meeting(address=address, port=int(self._store.port))

    def run(self, meeting: Meeting) -> int:
        """To the end of the training: 0, or 1 after a failure, which is in the log."""
        job, place = self._job, self._place
        _log_to(log_path(job.run_dir, "trainer", place.rank))
        start_log("trainer", place.rank)
        logger.info("host %s, GPUs %s", socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES") or "none")
        os.environ |= {"MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch's word for: the store is there already
        try:
            config = load_config(str(job.run_dir / "config.yaml"), [])
            settings = import_module("rlx.processes.device")
            device = settings.take_device(config.cluster.device, place.local_rank)
            settings.take_threads(config.cluster.threads_per_rank, place.ranks_here)
            import_module("rlx.cluster.rank").run_rank(config, place, device, job.run_dir / ENDPOINTS)
        except Exception as error:
            log_failure(error)
            return 1
        return 0


class EngineActor:
    """One engine, or what one node holds of it: its process, its health and its restarts. Needs two threads: ``serve`` lasts
    until ``stop``."""

    def __init__(self, job: Job, host: Host, index: int, part: EnginePart, incarnation: int) -> None:
        self._job, self._host, self._index, self._part, self._incarnation = job, host, index, part, incarnation
        _enter(job, host)
        mark = f"{job.id}-{index}-{part.rank}"
        kill_members((), mark, 10.0, variable=ENGINE_ID)  # of an earlier life: it would hold the GPUs
        os.environ[ENGINE_ID] = mark
        self._stopping, self._over = threading.Event(), threading.Event()

    def serve(self) -> Cause | None:
        """Until told to stop; the cause when the engine cannot be kept up."""
        _log_to(log_path(self._job.run_dir, "engine", self._index, self._part.rank))
        start_log("engine", self._index)
        try:
            return self._serve()
        finally:
            self._over.set()

    def stop(self) -> None:
        """End the engine's processes; returns when they have ended."""
        self._stopping.set()
        self._over.wait(20.0)

    def _serve(self) -> Cause | None:
        logger.info("host %s, GPUs %s of the plan's", socket.gethostname(), self._part.gpus or "none")
        module = import_module("rlx.engines.node")
        config = load_config(str(self._job.run_dir / "config.yaml"), [])
        node = module.Node(number=self._index, address=self._host.address, num_engines=self._host.num_engines)
        settings = EngineSettings.of(config)
        engines = module.NodeEngines(settings, self._job.run_dir, node, {self._index: self._part}, incarnation=self._incarnation)
        try:
            while not self._stopping.wait(_LOOK_S):
                cause: Cause | None = engines.tick()
                if cause is not None:
                    return cause
        finally:
            engines.stop()
        return None


def _enter(job: Job, host: Host | None = None) -> None:
    """Be where the launcher is: its folder, for relative paths, and its environment, which wins over what follows from the
    host (its GPUs, all of them and in one order, and its network interface)."""
    try:
        os.chdir(job.folder)
    except OSError as error:
        raise FileNotFoundError(
            f"host {socket.gethostname()} has no folder {job.folder}: start the run in one that all nodes share"
        ) from error
    if host is not None and host.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(host.gpus)
    for variable in VARIABLES:
        os.environ.pop(variable, None)  # Ray sets one by what was reserved
    os.environ |= job.env
    name = None if host is None else interface_of(host.address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _log_to(path: Path) -> None:
    """Send this process's output, children's included, to ``path``."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
