"""One engine on several nodes: how its processes meet, and that they live and die together.

Each node of the engine starts one process, its part. The node that leads begins a *life*: it chooses the address where the
parts meet and writes it to ``RUN_DIR/engines/span-ENGINE.json``. The other nodes look there, end what they still have of an
earlier life, start their part and say in ``span-ENGINE-NODE.json`` when it ends. To the leader the engine has ended once
any part has; whoever replaces it begins the next life.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import SIGKILL

from rlx.engines.fleet import write_whole
from rlx.processes.causes import describe, speaks_of_lost_peer, tail
from rlx.processes.children import Child, ChildSpec, end_now
from rlx.processes.rundir import log_path
from rlx.processes.supervisor import now_text
from rlx.rollout.sglang.server import Span

# The others lose their connections and end within moments of the first, whose words are the ones to show.
_SETTLE_S = 3.0
_TOLD_LINES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One life of an engine: a name that no other has, and where its parts meet (HOST:PORT)."""

    id: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PartState:
    """A part in one life. ``returncode`` None: it was started. Else how it ended, when it was last seen alive (ISO, UTC) and
    the last lines of its log."""

    life: str
    host: str
    returncode: int | None = None
    seen_alive: str = ""
    log: str = ""


class SpanningChild(Child):
    """The leader's part, which stands for the engine: ended once any part has. What it says then of its end, log and status
    are those of the part that was first."""

    def __init__(self, spec: ChildSpec, run_dir: Path, span: Span) -> None:
        super().__init__(spec)
        self._run_dir, self._num_nodes = run_dir, span.num_nodes
        self._life = Life(id=uuid.uuid4().hex, address=span.address)
        self._lock = threading.Lock()
        self._seen_alive, self._first_end = now_text(), 0.0
        self._ends: dict[int, PartState] = {}
        self._first: int | None = None
        write_whole(_life_path(run_dir, spec.rank), asdict(self._life))

    def poll(self) -> int | None:
        """As a process's, of the part that ended first; None until that is settled."""
        with self._lock:
            if self._first is None:
                self._look()
            return None if self._first is None else self._ends[self._first].returncode

    def log_text(self) -> str:
        return super().log_text() if self._first is None else self._ends[self._first].log

    def why(self) -> str | None:
        if self._first is None:
            absent = [str(node) for node in range(1, self._num_nodes) if node not in self._states()]
            return (
                f"of its {self._num_nodes} nodes, counted from 0, {', '.join(absent)} did not start their part"
                if absent
                else None
            )
        end = self._ends[self._first]
        assert end.returncode is not None
        return f"node {self._first} of its {self._num_nodes}, on {end.host}: {describe(end.returncode)}"

    def _states(self) -> dict[int, PartState]:
        """What the other nodes say of this life."""
        states = {node: _read(PartState, _state_path(self._run_dir, self.spec.rank, node)) for node in range(1, self._num_nodes)}
        return {node: state for node, state in states.items() if state is not None and state.life == self._life.id}

    def _look(self) -> None:
        now, own = now_text(), super().poll()
        if own is not None and 0 not in self._ends:
            self._ends[0] = PartState(
                life=self._life.id,
                host=socket.gethostname(),
                returncode=own,
                seen_alive=self._seen_alive,
                log=super().log_text(),
            )
        self._seen_alive = now
        self._ends |= {node: state for node, state in self._states().items() if state.returncode is not None}
        if not self._ends:
            return
        self._first_end = self._first_end or time.monotonic()
        if len(self._ends) == self._num_nodes or time.monotonic() - self._first_end > _SETTLE_S:
            first = min(self._ends, key=lambda node: (_is_consequence(self._ends[node]), self._ends[node].seen_alive))
            self.spec = replace(self.spec, log_path=log_path(self._run_dir, "engine", self.spec.rank, first))
            self._first = first


class Follower:
    """A part of engine ``index`` that another node leads: ``start`` starts it for a life that meets at the given address.

    Consumes the leader's file, produces the part's own; ``tick`` is called now and then and waits only for the end of a
    process that it kills.
    """

    def __init__(self, run_dir: Path, index: int, node: int, start: Callable[[str], Child]) -> None:
        self._run_dir, self._index, self._node, self._start = run_dir, index, node, start
        self._life: Life | None = None
        self._child: Child | None = None
        self._old: list[Child] = []
        self._seen_alive = now_text()

    def children(self) -> list[Child]:
        """The present process and those before it."""
        return [*self._old, *([] if self._child is None else [self._child])]

    def tick(self) -> None:
        """Begin the life that the leader has begun; tell it when the part has ended."""
        now = now_text()
        life = _read(Life, _life_path(self._run_dir, self._index))
        if life is not None and life != self._life:
            self._begin(life)
        elif self._child is not None and (status := self._child.poll()) is not None:
            self._tell(status, tail(self._child.log_text(), _TOLD_LINES))
            self._put_away()
        self._seen_alive = now

    def _begin(self, life: Life) -> None:
        self._put_away()
        self._life = life
        before = _read(PartState, _state_path(self._run_dir, self._index, self._node))
        if before is not None and before.life == life.id:
            # Someone else held this part and is gone. Its process went along, and none can join a life that has begun.
            self._tell(-SIGKILL, before.log)
            return
        self._tell(None, "")
        self._child = self._start(life.address)

    def _put_away(self) -> None:
        if self._child is not None:
            end_now(self._child)
            self._old.append(self._child)
            self._child = None

    def _tell(self, returncode: int | None, log: str) -> None:
        assert self._life is not None
        state = PartState(
            life=self._life.id, host=socket.gethostname(), returncode=returncode, seen_alive=self._seen_alive, log=log
        )
        write_whole(_state_path(self._run_dir, self._index, self._node), asdict(state))


def _is_consequence(end: PartState) -> bool:
    """SGLang kills itself once it has said why, so that its status says nothing."""
    return speaks_of_lost_peer(tail(end.log, _TOLD_LINES))


def _life_path(run_dir: Path, index: int) -> Path:
    return run_dir / "engines" / f"span-{index}.json"


def _state_path(run_dir: Path, index: int, node: int) -> Path:
    return run_dir / "engines" / f"span-{index}-{node}.json"


def _read[T](kind: Callable[..., T], path: Path) -> T | None:
    """None while there is none, or while a network file system replaces it."""
    try:
        return kind(**json.loads(path.read_text()))
    except OSError:
        return None
