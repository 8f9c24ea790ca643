"""The driver's way to publish: to the engines that serve now, without those that fail meanwhile.

A publication in which an engine dies or hangs is repeated on the others; the launcher starts the missing one again, and
it gets the weights with the next publication before any request reaches it. One on the trainers' devices is held back by the
launcher until a publication: the trainers put their parts away, let it start and wait until it serves or has failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlx.driver.lane import CommandLane
from rlx.engines.fleet import (
    Fleet,
    Held,
    Member,
    let_start,
    read_fleet,
    request_replacement,
)
from rlx.obs.log import logger
from rlx.rollout.sglang.control import EngineControl, EngineControlError
from rlx.sync.engine_memory import KEY_VALUES
from rlx.sync.errors import SyncError, SyncFailure
from rlx.sync.group import Endpoint
from rlx.trainer.commands import (
    BeginTraining,
    Command,
    EndTraining,
    MakeRoom,
    Publish,
)
from rlx.types.weights import WeightManifest

_POLL_S = 0.1
_ASK_S = 10.0
# Beyond rollout.start_timeout_s, within which the launcher itself gives an engine up: to notice and to end it.
_SETTLE_S = 60.0
_MAX_ATTEMPTS = 4
Adopt = Callable[[Sequence[str], int], None]


class EnginePublisher:
    """``path`` is the launcher's list of engines; ``adopt`` hears which urls serve which version after each success."""

    def __init__(self, lane: CommandLane, path: Path, *, start_timeout_s: float, shares_devices: bool = False) -> None:
        self._lane, self._path, self._start_timeout_s = lane, path, start_timeout_s
        self._shares_devices = shares_devices
        self._lock = threading.Lock()
        self._version = 0
        self._served: dict[str, int] = {}
        self._lives: dict[str, int] = {}
        self.adopt: Adopt = lambda urls, version: None

    @property
    def num_restarts(self) -> int:
        """Engines started again so far."""
        return read_fleet(self._path).num_restarts

    def publish(self, version: int) -> WeightManifest:
        """Publish until all engines that serve have ``version``. SyncError when no repair helps."""
        with self._lock:
            return self._publish(version)

    def publish_again(self) -> None:
        """The same version once more, for engines that came back. May be called from any thread while the driver waits
        for rollouts."""
        with self._lock:
            self._publish(self._version)

    def begin_training(self) -> None:
        """Engines on the trainers' devices make room until the next publication."""
        if self._shares_devices:
            with self._lock:
                self._take_turns(lambda engines: BeginTraining(endpoints=engines))

    @contextmanager
    def room(self) -> Iterator[None]:
        """Between publications: trainers have their devices inside, engines keep their weights and serve again afterwards."""
        if not self._shares_devices:
            yield
            return
        with self._lock:
            self._take_turns(lambda engines: BeginTraining(endpoints=engines, tags=(KEY_VALUES,)))
            yield
            self._take_turns(lambda engines: EndTraining(endpoints=engines))

    def _take_turns(self, make: Callable[[Sequence[Endpoint]], Command[Any, SyncFailure | None]]) -> None:
        """An engine that cannot follow is replaced; the others and the trainers go on, even when no engine is left."""
        fleet = read_fleet(self._path)
        failure = self._lane.ask(make(_endpoints(fleet)))
        if failure is not None:
            logger.warning("%s", failure.message)
            if not self._repair(fleet, failure):
                raise SyncError(failure.message)

    def report_unwell(self, url: str, why: str) -> None:
        """An engine that keeps answering wrongly: have it replaced."""
        fleet = read_fleet(self._path)
        for member in fleet.members:
            if fleet.launched and member.url == url:
                logger.warning("engine %s is to be replaced: %s", url, why)
                request_replacement(self._path.parent, member, why)

    def _publish(self, version: int) -> WeightManifest:
        message = ""
        for _ in range(_MAX_ATTEMPTS):
            fleet = self._serving()
            endpoints = _endpoints(fleet)
            answer = self._lane.ask(Publish(version=version, endpoints=endpoints))
            if isinstance(answer, WeightManifest):
                self._version = version
                self._served = {endpoint.url: version for endpoint in endpoints}
                self.adopt([endpoint.url for endpoint in endpoints], version)
                return answer
            assert isinstance(answer, SyncFailure)
            message = answer.message
            logger.warning("%s", message)
            if not self._repair(fleet, answer):
                break
        raise SyncError(message)

    def _serving(self) -> Fleet:
        """The engines to publish to, at least one. Waits for one that is being started; starts those that are held."""
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            fleet = read_fleet(self._path)
            if not fleet.launched:
                fleet = self._attached(fleet)
            elif fleet.held:
                fleet = self._let_start(fleet.held)
            if fleet.members:
                return fleet
            if time.monotonic() > deadline:
                raise SyncError(f"no engine serves after {self._start_timeout_s:g} s (rollout.start_timeout_s)")
            time.sleep(_POLL_S)

    def _let_start(self, held: Sequence[Held]) -> Fleet:
        """Start these while what trainers put away is away, which stays so until each serves or has failed: an engine takes
        what is free on its devices as it starts. SyncError when the launcher says nothing in time."""
        self._lane.ask(MakeRoom())
        for one in held:
            let_start(self._path.parent, one)
        limit_s = self._start_timeout_s + _SETTLE_S
        deadline = time.monotonic() + limit_s
        while True:
            fleet = read_fleet(self._path)
            waiting = [one.index for one in held if not _is_settled(one, fleet)]
            if not waiting:
                return fleet
            if time.monotonic() > deadline:
                numbers = ", ".join(map(str, waiting))
                raise SyncError(f"engine {numbers} neither serves nor was given up {limit_s:g} s after it was let start")
            time.sleep(_POLL_S)

    def _attached(self, fleet: Fleet) -> Fleet:
        """Others look after these engines. One that serves another version than it was given was started again."""
        members = []
        for member in fleet.members:
            version = self._ask(fleet, member)
            if version is None:
                logger.warning("engine %s does not answer; going on without it", member.url)
                continue
            given = self._served.get(member.url)
            if given is not None and version != str(given):
                self._lives[member.url] = self._lives.get(member.url, 0) + 1
            members.append(replace(member, incarnation=self._lives.get(member.url, 0)))
        return replace(fleet, members=tuple(members))

    def _ask(self, fleet: Fleet, member: Member) -> str | None:
        control = EngineControl(member.url, timeout_s=_ASK_S, keys=fleet.keys)
        try:
            return control.weight_version()
        except EngineControlError as error:
            if error.refused:
                raise SyncError(str(error)) from error
            return None
        finally:
            control.close()

    def _repair(self, fleet: Fleet, failure: SyncFailure) -> bool:
        """Have engines that died or hang replaced. False when there are none, or when they cannot be."""
        unwell = [m for m in fleet.members if m.url in failure.engines or self._ask(fleet, m) is None]
        if not unwell:
            return False
        if not fleet.launched:
            return any(self._ask(fleet, member) is not None for member in fleet.members if member not in unwell)
        for member in unwell:
            request_replacement(self._path.parent, member, failure.message)
        deadline = time.monotonic() + _ASK_S
        while set(unwell) & set(read_fleet(self._path).members):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


def _is_settled(held: Held, fleet: Fleet) -> bool:
    """Whether this life serves, or is over."""
    serves = any(member.index == held.index and member.incarnation >= held.incarnation for member in fleet.members)
    return serves or any(one.index == held.index and one.incarnation > held.incarnation for one in fleet.held)


def _endpoints(fleet: Fleet) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(url=m.url, tp=m.tp, incarnation=m.incarnation, index=m.index) for m in fleet.members)
