"""The launcher's engines: started, waited for, replaced when they end, and announced to the trainers.

``Engines`` is looked after by the launcher's tick; only waiting for ports and health happens in threads, one a start.

An engine on the trainers' devices takes what is free there as it starts, so one that ends while they work is held: it starts
again once the trainers, which have made room and wait for it, let it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rlx.config.parts import EngineSettings
from rlx.engines.fleet import (
    Fleet,
    Held,
    Member,
    take_request,
    take_start,
    write_fleet,
)
from rlx.obs.log import Phase
from rlx.processes.causes import Cause, is_port_taken, tail
from rlx.processes.children import Child, end_now
from rlx.processes.supervisor import Watched, now_text
from rlx.rollout.keys import EngineKeys
from rlx.rollout.server import parse_ready_port, wait_until_healthy
from rlx.rollout.sglang.server import Span

_POLL_S = 0.1
_MAX_PORT_RETRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """How to start one engine. ``port`` None: the engine takes one and says so in a ready line. ``host`` is where
    others reach it. ``span``: it is one of the engine's processes."""

    argv: Sequence[str]
    env: Mapping[str, str]
    port: int | None = None
    host: str = "127.0.0.1"
    span: Span | None = None


@dataclass(slots=True, eq=False)
class _Slot:
    """One engine of the run through all its incarnations. ``starting`` until it was healthy; then ``url`` is set. While it is
    ``held``, ``child`` is the one that ended."""

    index: int
    child: Child
    starting: Future[str]
    url: str | None = None
    incarnation: int = 0
    num_port_retries: int = 0
    held: bool = False
    old: list[Child] = field(default_factory=list)


class Engines:
    """``plan`` says how to start engine i now (ports differ each time), ``spawn`` starts it.

    The file ``path`` appears once all engines were healthy, if there are any; from then on it lists those that are, and those
    that are held.
    """

    def __init__(
        self,
        engines: EngineSettings,
        keys: EngineKeys,
        path: Path,
        *,
        plan: Callable[[int], EnginePlan],
        spawn: Callable[[int, EnginePlan], Child],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._keys, self._path = engines.rollout, keys, path
        self._shares_devices = engines.cluster.colocated
        self._plan, self._spawn, self._say = plan, spawn, say
        self._cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=engines.rollout.num_engines, thread_name_prefix="engine-start")
        self._slots: list[_Slot] = []
        self._written: Fleet | None = None
        self._failure: Cause | None = None
        self._num_restarts = 0

    def start(self, indices: Iterable[int], incarnation: int = 0) -> None:
        """Start these; returns at once. ``incarnation``: how many lives they had under others."""
        self._num_restarts = incarnation
        for index in indices:
            self._slots.append(_Slot(index, *self._launch(index), incarnation=incarnation))

    def tick(self) -> None:
        """Look at every engine: note those that became healthy, replace those that ended, announce what changed."""
        for slot in self._slots:
            if slot.held:
                if take_start(self._path.parent, slot.index, slot.incarnation):
                    self._begin(slot)
            elif slot.url is None:
                self._tend_starting(slot)
            elif slot.child.poll() is not None and self._has_restarts(slot):
                self._replace(slot, "ended")
            elif (why := take_request(self._path.parent, slot.index, slot.incarnation)) is not None and self._has_restarts(slot):
                self._replace(slot, f"answers wrongly or not at all: {why}")
        self._announce()

    def serving(self) -> bool:
        """True once all engines were healthy."""
        self.tick()
        return self._written is not None

    def failed(self) -> Cause | None:
        """The engine that did not become healthy, if any."""
        return self._failure

    def forgives(self, child: Watched) -> bool:
        """Whether this engine's end is not the run's: it is replaced already or held, or will be at the next tick."""
        slot = next((slot for slot in self._slots if slot.child is child), None)
        if slot is None or slot.held:
            return True
        return self._has_restarts(slot) if slot.url is not None or slot.incarnation else self._lost_its_port(slot)

    def children(self) -> list[Child]:
        """The present ones."""
        return [slot.child for slot in self._slots]

    def all_children(self) -> list[Child]:
        """Those that were replaced too."""
        return [child for slot in self._slots for child in (*slot.old, slot.child)]

    def cancel(self) -> None:
        """Stop waiting."""
        self._cancelled.set()
        self._pool.shutdown(wait=True)

    def _launch(self, index: int) -> tuple[Child, Future[str]]:
        plan = self._plan(index)
        child = self._spawn(index, plan)
        return child, self._pool.submit(self._wait, child, plan)

    def _tend_starting(self, slot: _Slot) -> None:
        if not slot.starting.done():
            return
        error = slot.starting.exception()
        if error is None:
            slot.url = slot.starting.result()
            if slot.incarnation:
                self._say(f"engine {slot.index} serves again")
        elif self._lost_its_port(slot):
            slot.num_port_retries += 1
            self._end(slot)
            self._begin(slot)
        elif slot.incarnation and self._has_restarts(slot):
            self._replace(slot, "did not become healthy")
        else:
            self._failure = self._failure or _cause(slot.child, error)

    def _lost_its_port(self, slot: _Slot) -> bool:
        ended = slot.child.poll() is not None
        return ended and slot.num_port_retries < _MAX_PORT_RETRIES and is_port_taken(slot.child.log_text())

    def _has_restarts(self, slot: _Slot) -> bool:
        return slot.incarnation < self._config.max_restarts

    def _replace(self, slot: _Slot, why: str) -> None:
        slot.incarnation += 1
        self._num_restarts += 1
        more = slot.child.why()
        told = f"{why}{'' if more is None else f' ({more})'}"
        # Before the list was there, no trainer has taken anything of its device.
        slot.held = self._shares_devices and self._written is not None
        waits = " waits until the trainers have made room" if slot.held else ""
        self._say(f"engine {slot.index} {told}; restart {slot.incarnation} of {self._config.max_restarts}{waits}")
        self._end(slot)
        if not slot.held:
            self._begin(slot)

    def _end(self, slot: _Slot) -> None:
        slot.url = None
        end_now(slot.child)

    def _begin(self, slot: _Slot) -> None:
        slot.held = False
        slot.old.append(slot.child)
        slot.child, slot.starting = self._launch(slot.index)

    def _announce(self) -> None:
        if not self._slots or (self._written is None and any(slot.url is None for slot in self._slots)):
            return
        tp = self._config.tp if self._config.engine == "sglang" else 1
        members = [
            Member(index=slot.index, url=slot.url, tp=tp, incarnation=slot.incarnation)
            for slot in self._slots
            if slot.url is not None
        ]
        held = tuple(Held(index=slot.index, incarnation=slot.incarnation) for slot in self._slots if slot.held)
        fleet = Fleet(members=tuple(members), held=held, keys=self._keys, num_restarts=self._num_restarts)
        if fleet != self._written:
            write_fleet(self._path, fleet)
            self._written = fleet

    def _wait(self, engine: Child, plan: EnginePlan) -> str:
        port = plan.port
        deadline = time.monotonic() + self._config.start_timeout_s

        def alive() -> bool:
            return engine.poll() is None and not self._cancelled.is_set()

        while port is None and (port := _reported_port(engine)) is None:
            if not alive():
                raise RuntimeError("the engine process ended before it reported its port")
            if time.monotonic() > deadline:
                limit = f"{self._config.start_timeout_s:g} s (rollout.start_timeout_s)"
                raise TimeoutError(f"the engine reported no port within {limit}")
            time.sleep(_POLL_S)
        url = f"http://{plan.host}:{port}"
        wait_until_healthy(url, max(0.1, deadline - time.monotonic()), alive, lambda: tail(engine.log_text(), 20))
        return url


def _cause(engine: Child, error: BaseException) -> Cause:
    # The log is shown apart.
    first_line = (str(error).splitlines() or [""])[0].removesuffix("; last lines of its log:")
    why = engine.why()
    return Cause(
        role=engine.spec.role,
        rank=engine.spec.rank,
        phase=Phase(name="start engine"),
        cause=f"{type(error).__name__}: {first_line}{'' if why is None else f' ({why})'}",
        log_path=engine.spec.log_path,
        when=now_text(),
    )


def _reported_port(engine: Child) -> int | None:
    for line in engine.log_text().splitlines():
        port = parse_ready_port(line)
        if port is not None:
            return port
    return None
