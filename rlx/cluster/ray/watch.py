"""The launcher's side of actors: whether they live, why they ended, and engines that are replaced when they die."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlx.cluster.ray.actors import Host
from rlx.engines.fleet import (
    Fleet,
    read_fleet,
    run_keys,
    write_fleet,
)
from rlx.engines.node import Assembly, part_path
from rlx.processes.causes import Cause
from rlx.processes.children import Identity
from rlx.processes.supervisor import Watched

_KILLED, _LOST = -9, -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec(Identity):
    """Whom an actor is, and where."""

    host: Host


class ActorChild:
    """An actor at its one long call; it ends with it. ``answer`` is what the call gave."""

    def __init__(self, spec: ActorSpec, handle: Any, call: Callable[[], Any]) -> None:
        self.spec, self.handle = spec, handle
        self.answer: Any = None
        self._log_start = spec.log_path.stat().st_size if spec.log_path.exists() else 0
        self._call = call()
        self._status: int | None = None
        self._why: str | None = None

    def poll(self) -> int | None:
        """As a process's; an actor that died without a word counts as killed."""
        if self._status is None and ray.wait([self._call], timeout=0)[0]:
            self._end()
        return self._status

    def why(self) -> str | None:
        return self._why

    def log_text(self) -> str:
        if not self.spec.log_path.exists():
            return ""
        with self.spec.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", errors="replace")

    def give_up(self, why: str) -> None:
        """Take it for dead, with its host, whatever Ray says."""
        if self._status is None:
            self._status, self._why = _LOST, why

    def _end(self) -> None:
        try:
            self.answer = ray.get(self._call)
        except RayTaskError as error:
            self._status, self._why = 1, str(error.cause).strip() or type(error.cause).__name__
        except RayError as error:
            self._status, self._why = _KILLED, reason_of_death(error, self.spec.host.name)
        else:
            self._status = self.answer if isinstance(self.answer, int) else int(self.answer is not None)


def reason_of_death(error: RayError, host: str) -> str:
    """Ray's account of an actor's end, in one line that begins with what it means here."""
    text = " ".join(str(error).split())
    if isinstance(error, RayActorError) and "node has died" in text:
        return f"host {host} was lost: Ray no longer hears from its node"
    detail = text.partition("Worker exit detail: ")[2] or text.partition("The actor is dead because ")[2] or text
    first = detail.partition(" Some common causes include")[0]
    if "connection error code 2" in first:
        return f"the actor's process on {host} was killed or crashed (Ray: {first})"
    return f"the actor on {host} ended: {first[:400]}"


@dataclass(slots=True, eq=False)
class _Slot:
    """One engine: the actor that leads it and those of its further nodes."""

    index: int
    actors: list[ActorChild]
    incarnation: int = 0
    num_said: int = 0
    old: list[ActorChild] = field(default_factory=list)


class RayEngines:
    """The engines' actors, ``nodes_of[i]`` of engine i. Each keeps its process up; one that dies itself is made anew, which
    counts as a restart too. ``make(i, k, n)`` starts the actor of engine i's k-th node in the engine's n-th life."""

    def __init__(
        self,
        run_dir: Path,
        nodes_of: Sequence[int],
        max_restarts: int,
        make: Callable[[int, int, int], ActorChild],
        say: Callable[[str], None],
    ) -> None:
        self._run_dir, self._max_restarts, self._make, self._say = run_dir, max_restarts, make, say
        self._slots = [_Slot(index, [make(index, node, 0) for node in range(count)]) for index, count in enumerate(nodes_of)]
        self._assembly = Assembly(run_dir, range(len(nodes_of)))

    def tick(self) -> None:
        """Replace actors that died; announce what serves."""
        for slot in self._slots:
            self._note_restarts(slot)
            for node, actor in enumerate(slot.actors):
                if actor.poll() is not None and self._may_replace(slot, actor):
                    self._replace(slot, node)
        self._assembly.tick()

    def children(self) -> Sequence[ActorChild]:
        return [actor for slot in self._slots for actor in slot.actors]

    def failed(self) -> Cause | None:
        """What the first engine that could not be kept up said."""
        causes = [actor.answer for actor in self.children() if isinstance(actor.answer, Cause)]
        return causes[0] if causes else None

    def forgives(self, child: Watched) -> bool:
        """A dead actor is replaced; one that ended with a cause is told by ``failed``."""
        found = [(slot, actor) for slot in self._slots for actor in slot.actors if actor is child]
        return not found or isinstance(found[0][1].answer, Cause) or self._may_replace(*found[0])

    def serving(self) -> bool:
        return self._assembly.is_complete

    def _may_replace(self, slot: _Slot, actor: ActorChild) -> bool:
        """Only an actor that was killed: one whose own code failed would fail again, and a lost host takes its ranks along."""
        return actor.poll() == _KILLED and slot.incarnation < self._max_restarts

    def _note_restarts(self, slot: _Slot) -> None:
        part = part_path(self._run_dir, slot.index)
        if part.exists():
            slot.incarnation = max([slot.incarnation, *(member.incarnation for member in read_fleet(part).members)])
        if slot.incarnation > slot.num_said:
            slot.num_said = slot.incarnation
            self._say(f"engine {slot.index} serves again; restart {slot.incarnation} of {self._max_restarts}")

    def _replace(self, slot: _Slot, node: int) -> None:
        actor = slot.actors[node]
        if node:
            # The one that leads hears of the new actor that the part is gone, and counts this as a restart.
            self._say(f"engine {slot.index}: {actor.why()}; its node {node} is made anew")
        else:
            slot.incarnation += 1
            slot.num_said = slot.incarnation
            self._say(f"engine {slot.index}: {actor.why()}; restart {slot.incarnation} of {self._max_restarts}")
            keys = run_keys(self._run_dir)
            write_fleet(part_path(self._run_dir, slot.index), Fleet(members=(), keys=keys, num_restarts=slot.incarnation))
        slot.old.append(actor)
        slot.actors[node] = self._make(slot.index, node, slot.incarnation)


class HostWatch:
    """Asks every keeper in turn whether its host is there. ``tick`` never waits."""

    def __init__(self, keepers: Sequence[tuple[Host, Any]]) -> None:
        self._keepers = list(keepers)
        self._asked: list[Any] = [keeper.ping.remote() for _, keeper in keepers]
        self._heard = [time.monotonic()] * len(keepers)

    def tick(self) -> None:
        """Note who answered and ask again."""
        for number, (_, keeper) in enumerate(self._keepers):
            if ray.wait([self._asked[number]], timeout=0)[0]:
                try:
                    ray.get(self._asked[number])
                except RayError:
                    continue  # silent from now on
                self._heard[number] = time.monotonic()
                self._asked[number] = keeper.ping.remote()

    def settle(self, limit_s: float) -> None:
        """Give every host the time to answer once more."""
        began = time.monotonic()
        while min(self._heard) < began and time.monotonic() - began < limit_s:
            self.tick()
            time.sleep(0.1)

    def silent(self, limit_s: float) -> list[Host]:
        """Hosts that have not answered for so long."""
        now = time.monotonic()
        return [host for (host, _), heard in zip(self._keepers, self._heard, strict=True) if now - heard > limit_s]
