"""A Ray cluster: joined, or started here for the length of a run. Room in it is reserved as a placement group.

Nothing here waits without a limit, and every wait ends when the user interrupts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

import rlx
from rlx.cluster.ray.address import RayAddress
from rlx.config.schema import ClusterConfig
from rlx.placement.ray_nodes import (
    LackError,
    RayNode,
    bundles_of,
    busy_text,
    own_cpus,
    plan_job,
)
from rlx.placement.seats import Demand, Seats
from rlx.processes.children import JOB_ID, LAUNCH_ID
from rlx.processes.environment import HANDED_ON, QUIET, hidden_gpus
from rlx.processes.interrupts import keep_handlers
from rlx.processes.threads import VARIABLES, thread_variables

_POLL_S = 0.2
_STORE_BYTES = 80 * 2**20  # what Ray asks for at least; no tensor of ours travels through its object store
_HANDED_ON = (*HANDED_ON, *VARIABLES)
# Keys of engines, which travel in a file, and marks by which other runs find their processes.
_KEPT = ("RLX_ENGINE_", LAUNCH_ID, JOB_ID)
Say = Callable[[str], None]


class Interrupted(Exception):
    """The user wants to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What was reserved: a bundle a node of the plan."""

    seats: Seats
    group: PlacementGroup


class RayCluster:
    """Joined at birth, left by ``leave``. ConnectionError when the cluster that was named does not answer."""

    def __init__(
        self, config: ClusterConfig, demand: Demand, where: RayAddress, job_id: str, interrupted: Callable[[], bool]
    ) -> None:
        self._config, self._demand, self._where, self._interrupted = config, demand, where, interrupted
        self._folder: Path | None = None
        shared: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        shared["runtime_env"] = {"env_vars": start_environment(job_id)}
        if where.is_own:
            self._folder = Path(tempfile.mkdtemp(prefix="rlx-ray-"))
            own: dict[str, Any] = {"num_cpus": own_cpus(config, demand, len(os.sched_getaffinity(0))), "include_dashboard": False}
            try:
                with keep_handlers():
                    ray.init("local", object_store_memory=_STORE_BYTES, _temp_dir=str(self._folder), **own, **shared)
            except BaseException:
                self.leave()
                raise
            return
        try:
            with keep_handlers():
                ray.init(where.address, **shared)
        except ConnectionError as error:
            raise ConnectionError(_refusal(where, error)) from error

    def leave(self) -> None:
        """Disconnect; a cluster of our own ends."""
        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def reserve(self, say: Say) -> Room:
        """Plan the job on the cluster's nodes and reserve its bundles.

        LackError after ``cluster.ray_wait_s`` without the nodes or the room (at once in a cluster of our own, which nobody
        joins and nobody else uses), PlacementError when no such cluster would do.
        """
        deadline = time.monotonic() + (0 if self._where.is_own else self._config.ray_wait_s)
        seats = self._plan(deadline, say)
        needed = bundles_of(self._config, seats)
        strategy = "STRICT_SPREAD" if len(needed) > 1 else "STRICT_PACK"
        group = placement_group([dict(bundle) for bundle in needed], strategy=strategy)
        try:
            self.wait_for([group.ready()], max(10.0, deadline - time.monotonic()), "the reservation")
        except TimeoutError as error:
            text = busy_text(needed, ray.cluster_resources(), ray.available_resources())
            remove_placement_group(group)
            raise LackError(f"the Ray cluster {self._where.name} {text} (cluster.ray_wait_s)") from error
        except Interrupted:
            remove_placement_group(group)
            raise
        return Room(seats=seats, group=group)

    def release(self, room: Room) -> None:
        """Give back what was reserved."""
        remove_placement_group(room.group)

    def wait_for(self, refs: Sequence[Any], limit_s: float, what: str) -> list[Any]:
        """Their values. TimeoutError, naming ``what``, after ``limit_s``; Interrupted; what the call raised there."""
        deadline = time.monotonic() + limit_s
        left = list(refs)
        while left:
            _, left = ray.wait(left, num_returns=len(left), timeout=_POLL_S)
            if self._interrupted():
                raise Interrupted
            if left and time.monotonic() > deadline:
                raise TimeoutError(f"no answer from {what} within {limit_s:.0f} s")
        return list(ray.get(list(refs)))

    def _plan(self, deadline: float, say: Say) -> Seats:
        told = False
        while True:
            try:
                return plan_job(self._config, self._demand, living_nodes())
            except LackError as error:
                if time.monotonic() >= deadline:
                    raise LackError(f"the Ray cluster {self._where.name} {error}") from error
                if not told:
                    say(f"waiting up to {self._config.ray_wait_s:g} s: the Ray cluster {self._where.name} {error}")
                    told = True
            if self._interrupted():
                raise Interrupted
            time.sleep(_POLL_S)


def living_nodes() -> list[RayNode]:
    """The cluster's nodes and all that they have."""
    return [
        RayNode(host=node["NodeManagerHostname"], cpus=node["Resources"].get("CPU", 0), gpus=node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def start_environment(job_id: str) -> dict[str, str]:
    """What the actors' processes must have when they start: the mark of the job, and where to import rlx from."""
    root = str(Path(rlx.__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return QUIET | {JOB_ID: job_id, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def actor_environment(cluster: ClusterConfig, given: Mapping[str, str]) -> dict[str, str]:
    """What the actors add to their environment: the launcher's settings of libraries, thread counts that somebody set, NCCL's
    defaults; on CPUs, that there are no GPUs."""
    env = {name: value for name, value in given.items() if name.startswith(_HANDED_ON) and not name.startswith(_KEPT)}
    if cluster.threads_per_rank is not None:
        env |= thread_variables(cluster.threads_per_rank, env, 1)
    # SGLang sets these for itself; a group whose two sides differ forms, and its first broadcast fails.
    defaults = {"TOKENIZERS_PARALLELISM": "false", "NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
    return defaults | env | hidden_gpus(cluster.device)


def _refusal(where: RayAddress, error: BaseException) -> str:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if any("InvalidAuthToken" in str(link) for link in chain):
        return f"the Ray cluster {where.name} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"
    return f"the Ray cluster {where.name} does not take this run: {error}"
