"""The driver's end of the lane: one queue of commands and one thread that talks to the ranks; callers hold futures.

Driver and ranks find each other through the store at MASTER_ADDR and MASTER_PORT that the ranks meet at too.

Commands go to all ranks in the order in which they were given, whoever gave them, and the next one starts when all have answered:
two collectives never cross. A rank that ends, or whose process stands still, ends the lane with an error that names it.
"""

from __future__ import annotations

import json
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from rlx.engines.fleet import run_keys
from rlx.obs.log import current_phase, logger
from rlx.processes.environment import Rendezvous
from rlx.trainer.channel import Channel, accept, challenge, pack
from rlx.trainer.commands import Command
from rlx.trainer.lane import Answer, DriverAddress, Leave, Order

_HELLO_S = 10.0
_LOOK_S = 1.0
_LEAST_SILENCE_S = 10.0


class LaneError(RuntimeError):
    """The lane to the ranks is over."""


class Listener:
    """Takes the ranks in, each with its proof; others are turned away and cost nothing but a thread for some seconds."""

    def __init__(self, host: str, secret: str, world_size: int) -> None:
        self._server = socket.create_server((host, 0), backlog=max(128, world_size))
        self._secret, self._world_size = secret, world_size
        self._joined: dict[int, socket.socket] = {}
        self._changed = threading.Condition()
        self.address = DriverAddress(host=host, port=int(self._server.getsockname()[1]))

    def wait(self, timeout_s: float) -> dict[int, socket.socket]:
        """All ranks' connections. TimeoutError names those that did not come."""
        threading.Thread(target=self._accept, name="lane-listener", daemon=True).start()
        with self._changed:
            came = self._changed.wait_for(lambda: len(self._joined) == self._world_size, timeout_s)
            missing = [rank for rank in range(self._world_size) if rank not in self._joined]
        if not came:
            raise TimeoutError(f"trainer {_ranks(missing)} did not join the driver within {timeout_s:g} s")
        return self._joined

    def close(self) -> None:
        """No more connections are taken."""
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._server.accept()
            except OSError:  # closed: all are here
                return
            threading.Thread(target=self._greet, args=(connection, peer), name="lane-greeting", daemon=True).start()

    def _greet(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        connection.settimeout(_HELLO_S)
        try:
            rank = challenge(connection, self._secret)
            with self._changed:
                if rank in self._joined or rank >= self._world_size:
                    raise PermissionError(f"rank {rank} of {self._world_size} is here already, or is none")
                accept(connection)
                self._joined[rank] = connection
                self._changed.notify_all()
        except OSError as error:
            logger.warning("a connection from %s:%d was turned away: %s", *peer[:2], error)
            connection.close()


@dataclass(frozen=True, slots=True, eq=False)
class Parts[A]:
    """One command in as many parts as there are different ones: ``make(part_of(rank))`` is rank ``rank``'s.

    A part is made when it is sent, once for all ranks that get it, and not kept: the driver never holds two.
    """

    make: Callable[[int], Command[Any, A]]
    part_of: Callable[[int], int]


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A command and who waits for its answer."""

    step: int
    command: Command[Any, Any] | Parts[Any] | Leave
    future: Future[Any]


class CommandLane:
    """Commands to all ranks, from any thread. ``lost`` is called when a rank is lost while nobody waits for an answer.

    ``silence_s``: how long a rank's process may show no sign of life (at least 10 s).
    """

    def __init__(
        self,
        connections: Mapping[int, socket.socket],
        *,
        silence_s: float,
        lost: Callable[[LaneError], None] = lambda error: None,
    ) -> None:
        self._silence_s = max(silence_s, _LEAST_SILENCE_S)
        self._channels = {rank: Channel(connection, self._silence_s) for rank, connection in sorted(connections.items())}
        self._heard = dict.fromkeys(self._channels, time.monotonic())
        self._look_at = 0.0
        self._queue: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._waker, self._woken = socket.socketpair()
        self._guard = threading.Lock()
        self._lost = lost
        self._failure: LaneError | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        for rank, channel in self._channels.items():
            self._selector.register(channel, selectors.EVENT_READ, rank)
        self._thread = threading.Thread(target=self._run, name="command-lane", daemon=True)
        self._thread.start()

    def submit[A](self, command: Command[Any, A] | Parts[A]) -> Future[A]:
        """Queue a command. The future gives the first answer that is not None, in rank order, or raises ``LaneError``."""
        return self._put(command)

    def ask[A](self, command: Command[Any, A] | Parts[A]) -> A:
        """Have the ranks run a command whose answer somebody knows, and wait for it."""
        return self.submit(command).result()

    def leave(self, *, done: bool) -> None:
        """Let the ranks go, after all that was asked before; the lane is over."""
        self._put(Leave(done=done)).result()
        self._thread.join()

    def _put(self, command: Command[Any, Any] | Parts[Any] | Leave) -> Future[Any]:
        future: Future[Any] = Future()
        with self._guard:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            self._queue.put(_Asked(current_phase().step, command, future))
            self._waker.send(b"\1")
        return future

    def _run(self) -> None:
        """The thread: consumes the queue and the ranks' answers, produces the futures' results; ends at ``Leave``, or with a
        rank."""
        asked: _Asked | None = None
        number = 0
        try:
            self._collect(0)  # models are loaded
            while asked is None or not isinstance(asked.command, Leave):
                asked = self._next()
                if asked.future.set_running_or_notify_cancel():
                    number += 1
                    asked.future.set_result(self._execute(number, asked))
            self._end(LaneError("the ranks were let go"))
        except Exception as error:  # whatever it is, callers wait for it
            failure = error if isinstance(error, LaneError) else LaneError(f"{type(error).__name__}: {error}")
            if not self._end(failure, asked):
                self._lost(failure)

    def _execute(self, number: int, asked: _Asked) -> Any:
        command = asked.command
        if isinstance(command, Leave):
            self._send(pack(command), self._channels)
            return None
        if isinstance(command, Parts):
            ranks_of: dict[int, list[int]] = {}
            for rank in self._channels:
                ranks_of.setdefault(command.part_of(rank), []).append(rank)
            for part, ranks in ranks_of.items():
                self._send(pack(Order(number=number, step=asked.step, command=command.make(part))), ranks)
        else:
            self._send(pack(Order(number=number, step=asked.step, command=command)), self._channels)
        return self._collect(number)

    def _send(self, message: list[memoryview], ranks: Iterable[int]) -> None:
        for rank in ranks:
            try:
                self._channels[rank].send_packed(message)
            except OSError as error:
                raise LaneError(f"the connection to trainer rank {rank} was lost ({error}): connection closed by peer") from error

    def _collect(self, number: int) -> Any:
        """All ranks' answers to an order; the first that is not None."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self._channels):
            for rank, message in self._hear():
                if isinstance(message, Answer):
                    assert message.number == number and rank not in answers, "one answer an order"
                    answers[rank] = message.value
        return next((answers[rank] for rank in self._channels if answers[rank] is not None), None)

    def _next(self) -> _Asked:
        while True:
            try:
                return self._queue.get_nowait()
            except queue.Empty:
                self._hear()

    def _hear(self) -> list[tuple[int, Any]]:
        """What came within a second. LaneError for ranks that are lost."""
        found: list[tuple[int, Any]] = []
        for key, _ in self._selector.select(_LOOK_S):
            if key.data is None:
                self._woken.recv(4096)
                continue
            try:
                found.append((key.data, self._channels[key.data].receive()))
            except OSError as error:
                raise LaneError(f"the connection to trainer rank {key.data} was lost: {error}") from error
            self._heard[key.data] = time.monotonic()
        self._check_silence()
        return found

    def _check_silence(self) -> None:
        now = time.monotonic()
        if now < self._look_at:  # answers of many ranks come one by one
            return
        self._look_at = now + _LOOK_S
        silent = [rank for rank, heard in self._heard.items() if now - heard > self._silence_s]
        if silent:
            raise LaneError(
                f"trainer {_ranks(silent)} showed no sign of life for {self._silence_s:g} s: the process is stopped or hangs,"
                " or its host was lost"
            )

    def _end(self, failure: LaneError, asked: _Asked | None = None) -> bool:
        """Refuse what waits and what comes. Whether anybody heard of it."""
        with self._guard:
            self._failure = failure
        waiting = [] if asked is None or asked.future.done() else [asked]
        while not self._queue.empty():
            waiting.append(self._queue.get())
        for one in waiting:
            one.future.set_exception(failure)
        self._selector.close()
        for channel in self._channels.values():
            channel.close()
        self._waker.close()
        self._woken.close()
        return bool(waiting)


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def announce_driver(meeting: Rendezvous, address: DriverAddress, timeout_s: float) -> None:
    """Say where the driver listens. ConnectionError when the store is not there in time: rank 0 or its launcher opens it."""
    _store(meeting, timeout_s).set(_key(meeting), json.dumps(asdict(address)))


def find_driver(meeting: Rendezvous, timeout_s: float) -> DriverAddress:
    """What was announced. ConnectionError when nothing is in time."""
    store = _store(meeting, timeout_s)
    try:
        store.wait([_key(meeting)], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise ConnectionError(f"the driver did not say where it is within {timeout_s:g} s; its log is driver-0.log") from error
    return DriverAddress(**json.loads(store.get(_key(meeting))))


def _store(meeting: Rendezvous, timeout_s: float) -> TCPStore:
    limit = timedelta(seconds=timeout_s)
    try:
        return TCPStore(meeting.address, meeting.port, is_master=False, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        at = f"{meeting.address}:{meeting.port} (MASTER_ADDR, MASTER_PORT)"
        raise ConnectionError(f"nobody answers at {at} within {timeout_s:g} s: {error}") from error


def _key(meeting: Rendezvous) -> str:
    return f"rlx/driver/{meeting.attempt}"


def lane_secret(run_dir: Path) -> str:
    """What ranks prove to know, from a file that only this user can read."""
    return str(run_keys(run_dir).admin_key)
