"""A host that falls silent is named; a run that is over names nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import TCPStore

from rlx.processes import heartbeat as module
from rlx.processes.heartbeat import LastWords, Pulse


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pulse, Pulse]]:
    monkeypatch.setattr(module, "_BEAT_S", 0.05)
    monkeypatch.setattr(module, "_LEAST_S", 1.0)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    both = Pulse(server, 0, range(2), run="r", end="end"), Pulse(client, 1, range(2), run="r", end="end")
    yield both
    for one in both:
        one.stop()


def test_silence_is_noticed_and_a_node_that_never_came_is_not(pair: tuple[Pulse, Pulse]) -> None:
    first, second = pair
    first.start()
    time.sleep(1.2)
    assert first.lost(0) is None, "others say when a node never joins"
    second.start()
    wait_for(lambda: first._heard and second._heard)
    assert first.lost(0) is None and second.lost(0) is None
    second.is_over = True  # its thread stops
    wait_for(lambda: first.lost(0) is not None)
    lost = first.lost(0)
    assert lost is not None and lost.node == 1 and "was lost: not heard of for" in str(lost)
    assert first.lost(30) is None


def test_a_node_that_leaves_says_why(pair: tuple[Pulse, Pulse]) -> None:
    first, second = pair
    first.start()
    second.start()
    wait_for(lambda: first._heard)
    words = LastWords(host="h", role="engine", rank=3, cause='it "died"', log=None)
    second.stop(words)
    wait_for(lambda: first.last_words is not None)
    assert first.last_words == words
    time.sleep(1.2)
    assert first.lost(0) is None, "its silence needs no more words"


def test_the_end_of_the_run_is_no_loss(pair: tuple[Pulse, Pulse]) -> None:
    first, second = pair
    first.start()
    second.start()
    wait_for(lambda: second._heard)
    first._store.set("end", "end")
    wait_for(lambda: first.is_over and second.is_over)
    time.sleep(1.2)
    assert first.lost(0) is None and second.lost(0) is None
