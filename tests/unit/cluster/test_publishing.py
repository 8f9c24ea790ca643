"""The driver and engines that are held back: room first, then the start, then the weights; every wait ends."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import rlx.driver.publishing as publishing
from rlx.driver.publishing import EnginePublisher
from rlx.engines.fleet import (
    Fleet,
    Held,
    Member,
    take_start,
    write_fleet,
)
from rlx.sync.engine_memory import KEY_VALUES
from rlx.sync.errors import SyncError
from rlx.trainer.commands import Command, Publish
from rlx.types.weights import WeightManifest


class RecordingRanks:
    """Stands in for the lane to all trainer ranks: notes what they are told, and delivers every publication."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def ask(self, command: Command[Any, Any]) -> Any:
        told = [getattr(command, field.name) for field in fields(command)]  # type: ignore[arg-type]
        shown = ([getattr(one, "url", one) for one in value] if isinstance(value, tuple) else value for value in told)
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(command).__name__).lower()
        self.calls.append((name, *(value for value in shown if value is not None)))
        if isinstance(command, Publish):
            return WeightManifest(version=command.version, tensors=(), num_bytes=0, seconds=0.0)
        return None


def member(index: int, incarnation: int = 0) -> Member:
    return Member(index=index, url=f"http://e{index}-{incarnation}", incarnation=incarnation)


@pytest.fixture
def ranks() -> RecordingRanks:
    return RecordingRanks()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    return tmp_path / "engines.json"


def publisher_of(ranks: RecordingRanks, path: Path, start_timeout_s: float = 10.0) -> EnginePublisher:
    return EnginePublisher(ranks, path, start_timeout_s=start_timeout_s, shares_devices=True)  # type: ignore[arg-type]


@contextmanager
def launcher(path: Path, ranks: RecordingRanks, answers: dict[int, Callable[[], Fleet]]) -> Iterator[None]:
    """Waits for life n of engine 0 to be let start, notes what the ranks had been told, then announces ``answers[n]``."""

    def serve() -> None:
        for life, answer in answers.items():
            while not take_start(path.parent, 0, life):
                if stop.wait(0.01):
                    return
            ranks.calls.append(("started", life))
            time.sleep(0.15)
            write_fleet(path, answer())

    stop = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_room_is_made_before_a_held_engine_starts_and_it_joins_the_publication(ranks: RecordingRanks, path: Path) -> None:
    write_fleet(path, Fleet(members=(member(1),), held=(Held(index=0, incarnation=1),)))
    with launcher(path, ranks, {1: lambda: Fleet(members=(member(0, 1), member(1)))}):
        publisher_of(ranks, path).publish(5)
    assert ranks.calls == [("make_room",), ("started", 1), ("publish", 5, ["http://e0-1", "http://e1-0"])]


def test_a_start_that_fails_is_not_repeated_while_others_serve(ranks: RecordingRanks, path: Path) -> None:
    write_fleet(path, Fleet(members=(member(1),), held=(Held(index=0, incarnation=1),)))
    with launcher(path, ranks, {1: lambda: Fleet(members=(member(1),), held=(Held(index=0, incarnation=2),))}):
        publisher_of(ranks, path).publish(5)
    assert ranks.calls == [("make_room",), ("started", 1), ("publish", 5, ["http://e1-0"])]


def test_the_only_engine_is_let_start_life_after_life(ranks: RecordingRanks, path: Path) -> None:
    write_fleet(path, Fleet(members=(), held=(Held(index=0, incarnation=1),)))
    failed = Fleet(members=(), held=(Held(index=0, incarnation=2),))
    with launcher(path, ranks, {1: lambda: failed, 2: lambda: Fleet(members=(member(0, 2),))}):
        publisher_of(ranks, path).publish_again()
    room, began = ("make_room",), "started"
    assert ranks.calls == [room, (began, 1), room, (began, 2), ("publish", 0, ["http://e0-2"])]


def test_a_launcher_that_says_nothing_ends_the_wait(ranks: RecordingRanks, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_SETTLE_S", 0.2)
    write_fleet(path, Fleet(members=(member(1),), held=(Held(index=0, incarnation=1),)))
    with pytest.raises(SyncError, match=r"engine 0 neither serves nor was given up 0\.5 s after it was let start"):
        publisher_of(ranks, path, start_timeout_s=0.3).publish(5)
    assert ("publish", 5, ["http://e1-0"]) not in ranks.calls


def test_trainers_work_and_save_without_waiting_for_held_engines(ranks: RecordingRanks, path: Path) -> None:
    write_fleet(path, Fleet(members=(), held=(Held(index=0, incarnation=1),)))
    publisher = publisher_of(ranks, path)
    publisher.begin_training()
    with publisher.room():
        pass
    assert ranks.calls == [("begin_training", []), ("begin_training", [], [KEY_VALUES]), ("end_training", [])]
    assert not take_start(path.parent, 0, 1)
