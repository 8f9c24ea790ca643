"""The lane of commands: one order for all ranks whoever asks, first answers, and ranks that are lost or stand still are named."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import rlx.driver.lane as lane_module
from rlx.driver.lane import CommandLane, LaneError, Listener, Parts
from rlx.trainer.channel import Channel, challenge
from rlx.trainer.commands import Command
from rlx.trainer.lane import DriverAddress, join_driver, serve, signs_of_life

SECRET = "of this run"


@dataclass
class Rank:
    """A worker that notes what it ran, slowly or with a failure where told."""

    number: int
    ran: list[Any] = field(default_factory=list)
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Command[Rank, int]):
    """Answers ``value`` on rank ``who`` alone."""

    title = "note"
    value: Any
    who: int = 0

    def run(self, worker: Rank) -> int | None:
        time.sleep(worker.delay_s * random.random())
        worker.ran.append(self.value)
        return self.value if worker.number == self.who else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum(Command[Rank, float]):
    title = "sum"
    values: np.ndarray

    def run(self, worker: Rank) -> float:
        self.values[0] += 1  # ours alone, and writable
        return float(self.values.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail(Command[Rank, None]):
    title = "fail"
    who: int

    def run(self, worker: Rank) -> None:
        if worker.number == self.who:
            raise ValueError("odd")


@contextmanager
def running(
    num_ranks: int, *, slow: int | None = None, silence_s: float = 60.0, **more: Any
) -> Iterator[tuple[CommandLane, list]]:
    """A lane to ranks that are threads here."""
    listener = Listener("127.0.0.1", SECRET, num_ranks)
    ranks = [Rank(number, delay_s=0.02 if number == slow else 0.0) for number in range(num_ranks)]
    results: list[Any] = [None] * num_ranks

    def be(rank: Rank) -> None:
        channel = join_driver(listener.address, SECRET, rank.number, 10)
        try:
            with signs_of_life(channel):
                results[rank.number] = serve(channel, rank)
        except Exception as error:
            results[rank.number] = error
        finally:
            channel.close()

    threads = [threading.Thread(target=be, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    lane = CommandLane(listener.wait(120), silence_s=60.0)
    listener.close()
    yield lane, [ranks, results]
    for thread in threads:
        thread.join(10)


def test_three_askers_and_a_slow_rank_never_cross() -> None:
    """Whoever asks, all ranks run the same commands in the same order, and everybody gets the answer to what he asked."""
    with running(3, slow=1) as (lane, [ranks, results]):
        futures: list[tuple[Any, Future[int]]] = []

        def ask(name: str) -> None:
            for count in range(20):
                value = (name, count)
                futures.append((value, lane.submit(Note(value=value, who=count % 3))))
                if count % 5 == 0:
                    assert lane.ask(Note(value=(name, count, "now"), who=2)) == (name, count, "now")  # type: ignore[comparison-overlap]

        askers = [threading.Thread(target=ask, args=(name,)) for name in ("evaluation", "recovery", "training")]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(60)
        assert len(futures) == 60 and all(future.result(10) == value for value, future in futures)
        lane.leave(done=False)
    first, *others = [rank.ran for rank in ranks]
    assert len(first) == 72 and all(other == first for other in others)
    for name in ("evaluation", "recovery", "training"):
        assert [value[1] for value in first if value[0] == name and len(value) == 2] == list(range(20))
    assert results == [False, False, False]


def test_each_rank_gets_its_own_part_packed_once_for_all_that_share_it() -> None:
    made: list[int] = []

    def make(part: int) -> Note:
        made.append(part)
        return Note(value=part, who=2)

    with running(4) as (lane, [ranks, _]):
        assert lane.ask(Parts(make, lambda rank: rank // 2)) == 1
        assert lane.ask(Note(value=7)) == 7
        lane.leave(done=True)
    assert made == [0, 1] and [rank.ran for rank in ranks] == [[0, 7], [0, 7], [1, 7], [1, 7]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes(Command[Rank, list]):
    title = "sizes"
    arrays: list

    def run(self, worker: Rank) -> list:
        return [array.tolist() for array in self.arrays]


def test_a_message_may_have_empty_arrays_and_very_many() -> None:
    arrays = [np.arange(index % 3) for index in range(1500)]
    with running(1) as (lane, _):
        assert lane.ask(Sizes(arrays=arrays)) == [array.tolist() for array in arrays]
        lane.leave(done=True)


def test_arrays_arrive_whole_and_writable() -> None:
    values = np.random.default_rng(0).normal(size=300_001)
    with running(2) as (lane, _):
        assert lane.ask(Sum(values=values)) == pytest.approx(values.sum() + 1)
        lane.leave(done=True)


def test_a_rank_that_fails_ends_every_wait_and_what_follows() -> None:
    with running(2) as (lane, [_, results]):
        waiting = lane.submit(Fail(who=1))
        behind = lane.submit(Note(value=1))
        for future in (waiting, behind):
            with pytest.raises(LaneError, match="connection to trainer rank 1 was lost: connection closed by peer"):
                future.result(60)
        with pytest.raises(LaneError, match="rank 1"):
            lane.ask(Note(value=2))
    assert isinstance(results[1], ValueError) and isinstance(results[0], ConnectionError)


def test_a_rank_that_is_lost_while_nobody_asks_is_told() -> None:
    told: list[LaneError] = []
    heard = threading.Event()

    def lost(error: LaneError) -> None:
        told.append(error)
        heard.set()

    listener = Listener("127.0.0.1", SECRET, 1)
    process = _stand_in(listener.address)
    lane = CommandLane(listener.wait(120), silence_s=60, lost=lost)
    assert lane.ask(Note(value=3)) == 3
    process.kill()
    assert heard.wait(60) and "trainer rank 0 was lost" in str(told[0])
    process.join()


def test_a_process_that_stands_still_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "_LEAST_SILENCE_S", 3.0)
    listener = Listener("127.0.0.1", SECRET, 2)
    processes = [_stand_in(listener.address, rank) for rank in (0, 1)]
    lane = CommandLane(listener.wait(120), silence_s=3.0)
    assert lane.ask(Note(value=4)) == 4
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(LaneError, match=r"trainer rank 1 showed no sign of life for 3 s: the process is stopped or hangs"):
        lane.ask(Note(value=5))
    assert time.monotonic() - began < 30
    for process in processes:
        process.kill()
        process.join()


def test_strangers_are_turned_away_and_missing_ranks_named() -> None:
    listener = Listener("127.0.0.1", SECRET, 2)
    joined: list[Any] = []
    waiter = threading.Thread(target=lambda: joined.append(_error(lambda: listener.wait(4))))
    waiter.start()
    address = (listener.address.host, listener.address.port)
    silent = socket.create_connection(address)  # says nothing, holds nobody up
    with pytest.raises(ConnectionError, match="cannot be joined"):
        join_driver(listener.address, "a guess", 0, 5)
    channel = join_driver(listener.address, SECRET, 1, 5)
    with pytest.raises(ConnectionError, match="cannot be joined"):
        join_driver(listener.address, SECRET, 1, 5)  # it is here already
    waiter.join(20)
    assert isinstance(joined[0], TimeoutError) and "trainer rank 0 did not join the driver within 4 s" in str(joined[0])
    for one in (silent, channel, listener):
        one.close()


def test_nothing_is_unpickled_before_the_proof() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b"\x80\x05" + b"x" * 64)
    with pytest.raises(PermissionError):
        challenge(ours, SECRET)
    ours.close()
    theirs.close()


def _error(call: Any) -> Any:
    try:
        return call()
    except Exception as error:
        return error


def _stand_in(address: DriverAddress, rank: int = 0) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=_be_rank, args=(address, rank))
    process.start()
    return process


def _be_rank(address: DriverAddress, rank: int) -> None:
    channel: Channel = join_driver(address, SECRET, rank, 120)
    with signs_of_life(channel):
        serve(channel, Rank(rank))
