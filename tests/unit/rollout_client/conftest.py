from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from tests.unit.rollout_client.peer import Behaviour, Peer


@pytest.fixture
def start_peer() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def start(behaviour: Behaviour | None = None) -> Peer:
        peers.append(Peer(behaviour))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Fresh inputs every run; the seed is printed so that a failure can be repeated."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"rng seed {seed}")
    return random.Random(seed)
