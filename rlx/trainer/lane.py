"""A trainer rank's end of the lane: it joins the driver, runs its commands one after the other, and shows that it lives."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlx.obs.log import WAITING, Phase, enter_phase
from rlx.trainer.channel import Channel, ChannelClosed, answer_challenge
from rlx.trainer.commands import Command

BEAT_S = 1.0


class Order(NamedTuple):
    """From the driver: run this as part of ``step``."""

    number: int
    step: int
    command: Command[Any, Any]


class Answer(NamedTuple):
    """From a rank: what order ``number`` gave here; number 0 says that the models are loaded."""

    number: int
    value: Any = None


@dataclass(frozen=True, slots=True)
class Beat:
    """From a rank, each second: its process runs, whatever its main thread waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """From the driver: it is over; ``done`` is False when the run was asked to save and leave."""

    done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverAddress:
    """Where the driver listens."""

    host: str
    port: int


def join_driver(address: DriverAddress, secret: str, rank: int, timeout_s: float) -> Channel:
    """Connect as ``rank``. ConnectionError when the driver cannot be reached or does not take this rank."""
    try:
        connection = socket.create_connection((address.host, address.port), timeout_s)
        answer_challenge(connection, secret, rank)
    except OSError as error:
        raise ConnectionError(f"the driver at {address.host}:{address.port} cannot be joined: {error}") from error
    return Channel(connection)


@contextmanager
def signs_of_life(channel: Channel) -> Iterator[None]:
    """Inside, a thread sends a beat each second. It waits for nothing but the network and ends with the block."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            try:
                channel.send(Beat())
            except OSError:
                return  # the main thread meets the same end

    thread = threading.Thread(target=beat, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(BEAT_S)


def serve(channel: Channel, worker: Any) -> bool:
    """Run the driver's commands until it leaves; whether the run is done. ConnectionError when the driver is lost.

    A command that fails raises here: the rank ends, which the driver and whoever supervises the ranks notice.
    """
    channel.send(Answer(number=0))
    while True:
        try:
            order = channel.receive()
        except ChannelClosed as error:
            raise ConnectionError("the connection to the driver was lost: it ended or was ended") from error
        if isinstance(order, Leave):
            return order.done
        enter_phase(Phase(step=order.step, name=order.command.title))
        value = order.command.run(worker)
        enter_phase(Phase(step=order.step, name=WAITING))
        channel.send(Answer(number=order.number, value=value))
