"""The order in which a rank and the engines on its device give and take memory."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rlx.trainer.link as link_module
from rlx.config.schema import SyncConfig
from rlx.sync.engine_memory import KEY_VALUES
from rlx.sync.errors import SyncError, SyncFailure
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.trainer.link import EngineLink, LinkOptions
from rlx.types.precision import FP32
from rlx.types.weights import WeightManifest

ENDPOINT = (Endpoint(url="http://e0", incarnation=1),)


class Events:
    """Both the rank's memory and its publisher: notes what either is asked for."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.seen.append((name, *args))

    def release(self, tags: Any) -> None:
        self.seen.append(("release", tags))
        if self.fails:
            raise SyncError("no room", ["http://e0"])

    def publish(self, version: int, tensors: Iterator[Any]) -> WeightManifest:
        self.seen.append(("publish", version))
        return WeightManifest(version=version, tensors=(), num_bytes=0, seconds=0.0)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    found = Events()
    monkeypatch.setattr(link_module, "make_publisher", lambda *arguments: found)
    return found


@pytest.fixture
def link(events: Events) -> EngineLink:
    options = LinkOptions(sync=SyncConfig(), transport="shm", shares=True)
    context: Any = SimpleNamespace(device=torch.device("cpu"), rank=0, dims=SimpleNamespace(pp=1))
    canary = CanarySpec(vocab_size=8, seed=0, precision=FP32, score_on_trainer=lambda rows, images: [], export=lambda: iter(()))
    memory: Any = events
    return EngineLink(options, context, {}, canary, memory)


def test_engines_give_their_cache_back_before_the_weights_come_to_be_published(link: EngineLink, events: Events) -> None:
    """Those that serve, or have just started, have it; the others gave it before and are not asked."""
    assert isinstance(link.publish(3, ENDPOINT), WeightManifest)
    away = ("put_away", ("optimizer", "gradients"))
    assert events.seen == [away, ("release", (KEY_VALUES,)), ("bring_back", ("weights",)), ("publish", 3)]


def test_an_engine_that_cannot_give_it_back_is_an_answer(link: EngineLink, events: Events) -> None:
    events.fails = True
    assert link.publish(3, ENDPOINT) == SyncFailure(message="no room", engines=("http://e0",))
    assert ("bring_back", ("weights",)) not in events.seen and events.seen[-1] == ("close",)


def test_room_is_everything_that_may_be_away(link: EngineLink, events: Events) -> None:
    link.make_room()
    assert events.seen == [("put_away",)]


def test_a_rank_takes_its_turns_without_engines_too(link: EngineLink, events: Events) -> None:
    assert link.begin_training((), None) is None and link.end_training(()) is None
    assert events.seen == [("bring_back",), ("put_away",)]
