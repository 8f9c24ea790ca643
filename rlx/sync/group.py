"""The broadcast group of one pipeline stage: its sender (rank 0) and every rank of every engine behind it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
from torch.distributed import ProcessGroup

from rlx.obs.log import logger
from rlx.rollout.control import EngineControl
from rlx.rollout.weight_group import join_weight_group, leave_weight_group
from rlx.sync.errors import SyncError
from rlx.sync.fanout import first_failure, start

CLOSE_LIMIT_S = 10.0
# The server's own limit may be as long as ours; its answer is worth waiting a moment longer for.
GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One engine: its url and over how many ranks it splits the model (each of them joins every group)."""

    url: str
    tp: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An endpoint with an open control connection."""

    endpoint: Endpoint
    control: EngineControl

    @property
    def url(self) -> str:
        return self.endpoint.url


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGroup:
    """An open group, as its sender holds it."""

    name: str
    stage: int
    group: ProcessGroup
    engines: tuple[Engine, ...]


def rank_offsets(endpoints: Sequence[Endpoint]) -> list[int]:
    """The first rank of each engine in a group: the sender is 0, the engines follow in order."""
    offsets = [1]
    for endpoint in endpoints:
        offsets.append(offsets[-1] + endpoint.tp)
    return offsets[:-1]


def open_group(stage: int, engines: Sequence[Engine], backend: str, device: torch.device, timeout_s: float) -> StageGroup:
    """Create the stage's group from the sender's side; all engines join over HTTP meanwhile.

    Raises SyncError naming the engines that are missing, at once when one refuses and after ``timeout_s`` otherwise.
    """
    check_alive(engines, stage, timeout_s)
    name = f"rlx-weights-{stage}"
    urls = [engine.url for engine in engines]
    address, port = sender_address(urls), free_port()
    world_size = 1 + sum(engine.endpoint.tp for engine in engines)
    futures = {
        engine.url: start(_init_call(engine.control, address, port, offset, world_size, name, backend))
        for engine, offset in zip(engines, rank_offsets([engine.endpoint for engine in engines]), strict=True)
    }

    def join() -> ProcessGroup:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device belongs to the thread
        return join_weight_group(
            master_address=address,
            master_port=port,
            rank=0,
            world_size=world_size,
            group_name=name,
            backend=backend,
            timeout_s=timeout_s,
        )

    # Joining waits inside torch and cannot be called off, so it has a thread that a refusing engine lets us leave behind.
    joining = start(join)
    # The engines first: when all of them have joined, the sender has too, or is about to.
    failure = first_failure(futures, timeout_s + GRACE_S) or first_failure({"sender": joining}, GRACE_S + 1)
    if failure is not None:
        who, error = failure
        there = [url for url, future in futures.items() if future.done() and future.exception() is None]
        raise SyncError(
            f"stage {stage}, phase group: {who} did not join {name} at {address}:{port} within {timeout_s:g} s"
            f" ({len(there)} of {len(urls)} engines did): {error}"
        ) from error
    return StageGroup(name=name, stage=stage, group=joining.result(), engines=tuple(engines))


def check_alive(engines: Sequence[Engine], stage: int, timeout_s: float) -> None:
    """Raise SyncError naming the engine that does not answer. A dead one is thus found before anybody waits for it."""
    failure = first_failure({engine.url: start(engine.control.model_info) for engine in engines}, timeout_s + GRACE_S)
    if failure is not None:
        raise SyncError(f"stage {stage}, phase group: {failure[0]} does not answer: {failure[1]}") from failure[1]


def close_group(opened: StageGroup) -> None:
    """Destroy the group on both sides. Ends within ``CLOSE_LIMIT_S`` whatever state the group is in; what fails is logged."""
    calls = {engine.url: start(_destroy_call(engine.control, opened.name)) for engine in opened.engines}
    calls["sender"] = start(lambda: leave_weight_group(opened.group))
    while calls:
        failure = first_failure(calls, CLOSE_LIMIT_S)
        if failure is None:
            return
        logger.warning("closing %s: %s: %s", opened.name, *failure)
        calls = {who: future for who, future in calls.items() if who != failure[0] and who not in failure[0].split(", ")}


def sender_address(urls: Sequence[str]) -> str:
    """This host's address as the engines see it: the source address of the route to the first one that is not local."""
    addresses = [_route_source(url) for url in urls]
    return next((address for address in addresses if not address.startswith("127.")), addresses[0])


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _route_source(url: str) -> str:
    parts = urlsplit(url)
    if parts.hostname is None:
        raise ValueError(f"rollout.endpoints: {url!r} is not a url with a host, like http://host:30000")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((parts.hostname, parts.port or 80))  # a datagram socket only looks up the route
        except OSError as error:
            raise SyncError(f"phase group: no route to engine {url}: {error}") from error
        return str(probe.getsockname()[0])


def _init_call(
    control: EngineControl, address: str, port: int, offset: int, world_size: int, name: str, backend: str
) -> Callable[[], None]:
    return lambda: control.init_group(
        address, port, rank_offset=offset, world_size=world_size, group_name=name, backend=backend
    )


def _destroy_call(control: EngineControl, name: str) -> Callable[[], None]:
    return lambda: control.destroy_group(name)
