"""Several engines: balance, setting aside, coming back, nobody left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from rlx.rollout.router import EngineRouter, NoEngineError
from rlx.rollout.sglang.answers import EngineError
from rlx.rollout.sglang.client import (
    EngineClient,
    RetryPolicy,
    RolloutStats,
    open_session,
)
from rlx.types.rollout import SamplingSpec
from tests.unit.rollout_client.peer import VOCAB, Answer, Peer, answer_to, expected


@asynccontextmanager
async def router_of(peers: Sequence[Peer], timeout_s: float = 20.0, retries: int = 4) -> AsyncIterator[EngineRouter]:
    stats = RolloutStats()
    async with open_session() as session:
        engines = [EngineClient(peer.url, timeout_s, vocab_size=VOCAB, session=session, stats=stats) for peer in peers]
        retry = RetryPolicy(max_retries=retries, base_s=0.01)
        router = EngineRouter(engines, retry, stats, max_failures=2, probe_interval_s=0.1)
        try:
            yield router
        finally:
            await router.close()


async def test_short_requests_fill_up_the_engine_beside_a_long_one(start_peer: Callable[..., Peer]) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> Answer:
        await asyncio.sleep(0.3)
        return answer_to(payload)

    peers = [start_peer(behaviour) for _ in range(2)]
    async with router_of(peers) as router:
        long = [router.generate((1,), SamplingSpec(max_new_tokens=99), 0)]
        short = [router.generate((1,), SamplingSpec(max_new_tokens=9), n) for n in range(10)]
        await asyncio.gather(*long, *short)
    assert sorted(len(peer.seen) for peer in peers) == [1, 10]


async def test_finished_requests_weigh_nothing(start_peer: Callable[..., Peer]) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> Answer:
        await asyncio.sleep(0.1)
        return answer_to(payload)

    peers = [start_peer(behaviour) for _ in range(2)]
    async with router_of(peers) as router:
        await router.generate((1,), SamplingSpec(max_new_tokens=99), 0)
        for peer in peers:
            peer.seen.clear()
        await asyncio.gather(*[router.generate((1,), SamplingSpec(max_new_tokens=3), n) for n in range(2)])
    assert [len(peer.seen) for peer in peers] == [1, 1]


async def test_equal_requests_are_spread_evenly(start_peer: Callable[..., Peer], rng: random.Random) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> Answer:
        await asyncio.sleep(0.2)
        return answer_to(payload)

    count = rng.randint(20, 40)
    peers = [start_peer(behaviour) for _ in range(3)]
    async with router_of(peers) as router:
        await asyncio.gather(*[router.generate((1, 2), SamplingSpec(max_new_tokens=3), n) for n in range(count)])
    sizes = [len(peer.seen) for peer in peers]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1


async def test_a_failing_engine_is_set_aside_and_comes_back(start_peer: Callable[..., Peer]) -> None:
    broken = True

    async def behaviour(peer: Peer, payload: Answer) -> web.StreamResponse | Answer:
        return web.Response(status=500) if broken else answer_to(payload)

    bad, good = start_peer(behaviour), start_peer()
    bad.healthy = False
    spec = SamplingSpec(max_new_tokens=3)
    async with router_of([bad, good]) as router:
        for n in range(12):
            assert (await router.generate((n,), spec, n)).token_ids == tuple(expected((n,), n, 3)[0])
        assert len(bad.seen) == 2, "set aside after two failures in a row"
        broken, bad.healthy = False, True
        for n in range(200):
            await router.generate((5,), spec, n)
            await asyncio.sleep(0.01)
            if len(bad.seen) > 2:
                break
        assert len(bad.seen) > 2, "probed and taken back"


async def test_an_answer_begun_on_one_engine_goes_on_on_another(start_peer: Callable[..., Peer]) -> None:
    async def cut(peer: Peer, payload: Answer) -> Answer | None:
        return answer_to(payload, "3", abort_after=2) if len(peer.seen) == 1 else None

    dying, good = start_peer(cut), start_peer()
    async with router_of([dying, good]) as router:
        got = await router.generate((8, 8), SamplingSpec(max_new_tokens=7), 21)
    assert got.token_ids == tuple(expected((8, 8), 21, 7)[0])
    assert got.weight_versions == (3, 3, 0, 0, 0, 0, 0)


async def test_an_engine_that_hangs_is_left_for_another(start_peer: Callable[..., Peer]) -> None:
    async def hang(peer: Peer, payload: Answer) -> None:
        await asyncio.sleep(30)

    stuck, good = start_peer(hang), start_peer()
    async with router_of([stuck, good], timeout_s=0.4) as router:
        got = await router.generate((1,), SamplingSpec(max_new_tokens=4), 2)
    assert got.token_ids == tuple(expected((1,), 2, 4)[0]) and len(stuck.seen) == 1

    other = start_peer(hang)
    async with router_of([stuck, other], timeout_s=0.3) as router:
        with pytest.raises(EngineError, match="within the limit"):
            await router.generate((1,), SamplingSpec(max_new_tokens=4), 2)
    assert (len(stuck.seen), len(other.seen)) == (2, 1), "each engine gets the time limit once"


async def test_nobody_left_lists_every_engine(start_peer: Callable[..., Peer]) -> None:
    async def sick(peer: Peer, payload: Answer) -> web.StreamResponse:
        return web.Response(status=502, text="sick")

    gone, ill = start_peer(), start_peer(sick)
    ill.healthy = False
    gone.close()
    async with router_of([gone, ill], retries=6) as router:
        with pytest.raises(NoEngineError, match="none of 2 engines") as caught:
            await router.generate((1,), SamplingSpec(max_new_tokens=4), 2)
    text = str(caught.value)
    assert f"{gone.url}: connection failed" in text and f"{ill.url}: /health answered HTTP 503" in text


async def test_a_lone_engine_survives_a_blip(start_peer: Callable[..., Peer]) -> None:
    async def blip(peer: Peer, payload: Answer) -> Answer | None:
        return None if len(peer.seen) <= 30 else answer_to(payload)

    async with router_of([start_peer(blip)]) as router:
        got = await asyncio.gather(*[router.generate((n,), SamplingSpec(max_new_tokens=2), n) for n in range(30)])
    assert [each.token_ids for each in got] == [tuple(expected((n,), n, 2)[0]) for n in range(30)]
