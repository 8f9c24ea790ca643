"""The broadcast group of one pipeline stage: its sender (rank 0) and every rank of every engine behind it."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import torch
from torch.distributed import ProcessGroup

from rlx.obs.log import logger
from rlx.rollout.sglang.control import EngineControl
from rlx.rollout.sglang.weight_group import join_weight_group, leave_weight_group
from rlx.sync.errors import SyncError
from rlx.sync.fanout import call_all, describe, failures, start, unwell
from rlx.sync.ports import free_port

CLOSE_LIMIT_S = 10.0
# Each side has the same limit; waiting this much longer lets the one that timed out say so itself.
GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One engine: its url, over how many ranks it splits the model (each of them joins every group), which of its lives this is
    (after a restart it has forgotten its groups and weights) and its number in the run."""

    url: str
    tp: int = 1
    incarnation: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An endpoint and the connection that controls it."""

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

    Raises SyncError naming the engines that are missing: at once when one refuses, after ``timeout_s`` otherwise.
    """
    # A name of its own: what an earlier group left behind on an engine must not stand in the way.
    name = f"rlx-weights-{stage}-{secrets.token_hex(4)}"
    urls = [engine.url for engine in engines]
    try:
        # A dead engine is found here, before anybody waits for it inside a rendezvous.
        call_all({engine.url: engine.control.model_info for engine in engines}, timeout_s + GRACE_S)
        address, port = sender_address(urls), free_port("")
    except SyncError as error:
        raise SyncError(f"engine side, stage {stage}, phase group: {error}", error.engines) from error
    except OSError as error:
        raise SyncError(f"trainer side, stage {stage}, phase group: {error}") from error
    world_size = 1 + sum(engine.endpoint.tp for engine in engines)
    joining_engines = {
        engine.url: start(
            partial(
                engine.control.init_group,
                address,
                port,
                rank_offset=offset,
                world_size=world_size,
                group_name=name,
                backend=backend,
            )
        )
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

    # Joining waits inside torch and cannot be called off: in a thread of its own it can be left when an engine refuses.
    joining = start(join)
    # An engine that has joined has met the sender, so the sender needs only a moment more once all of them have.
    found = failures(joining_engines, timeout_s + GRACE_S) or failures({"the sender": joining}, 2 * GRACE_S)
    if found:
        where = f"{name} at {address}:{port} within {timeout_s:g} s"
        missing = ", ".join(found)
        raise SyncError(
            f"engine side, stage {stage}, phase group: {missing} did not join {where}"
            f" ({len(urls) - len([url for url in urls if url in found])} of {len(urls)} engines did): {describe(found)}",
            [url for url in unwell(found) if url in urls],
        ) from next(iter(found.values()))
    return StageGroup(name=name, stage=stage, group=joining.result(), engines=tuple(engines))


def close_group(opened: StageGroup) -> None:
    """Destroy the group on both sides. Ends within ``CLOSE_LIMIT_S`` whatever state the group is in; failures are logged."""
    calls = {engine.url: start(partial(engine.control.destroy_group, opened.name)) for engine in opened.engines}
    calls["the sender"] = start(partial(leave_weight_group, opened.group))
    while calls:
        found = failures(calls, CLOSE_LIMIT_S)
        if found:
            logger.warning("closing %s: %s", opened.name, describe(found))
        calls = {who: future for who, future in calls.items() if not future.done() and who not in found}


def sender_address(urls: Sequence[str]) -> str:
    """This host's address as the engines see it: where the route to the first engine that is not local starts."""
    addresses = [_route_source(url) for url in urls]
    return next((address for address in addresses if not address.startswith("127.")), addresses[0])


def _route_source(url: str) -> str:
    parts = urlsplit(url)
    if parts.hostname is None:
        raise ValueError(f"rollout.endpoints: {url!r} is not a url with a host, like http://host:30000")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # a datagram socket only looks up the route
        return str(probe.getsockname()[0])
