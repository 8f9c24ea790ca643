"""Groups: order, seeds, limits, failures, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlx.config.schema import RolloutConfig
from rlx.rollout.generate import HttpRolloutService, sample_seed, validate_prompts
from rlx.rollout.record import RolloutRecorder, RolloutReplay
from rlx.rollout.router import EngineCare
from rlx.rollout.sglang.answers import EngineError
from rlx.types.rollout import Prompt, RolloutGroup, SamplingSpec
from tests.unit.rollout_client.peer import VOCAB, Answer, Peer, answer_to, expected


def some_prompts(rng: random.Random, count: int) -> list[Prompt]:
    ids = rng.sample(range(10_000), count)
    return [Prompt(prompt_id=i, token_ids=tuple(rng.choices(range(VOCAB), k=rng.randint(1, 9))), text="") for i in ids]


def open_sockets() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError:
            continue
    return count


def eventually(condition: Callable[[], bool], limit_s: float = 5.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@contextmanager
def service_of(*peers: Peer, **settings: Any) -> Iterator[HttpRolloutService]:
    """A service whose close must leave no thread and no client socket."""
    threads = set(threading.enumerate())
    settings = {"request_timeout_s": 20.0, "max_retries": 2, **settings}
    service = HttpRolloutService([peer.url for peer in peers], RolloutConfig(**settings), VOCAB)
    try:
        yield service
    finally:
        service.close()
        service.close()
        assert set(threading.enumerate()) <= threads


async def jittery(peer: Peer, payload: Answer) -> Answer:
    await asyncio.sleep(random.uniform(0, 0.05))
    return answer_to(payload)


def test_results_do_not_depend_on_timing_or_engines(start_peer: Callable[..., Peer], rng: random.Random) -> None:
    prompts = some_prompts(rng, 7)
    sampling = SamplingSpec(num_samples=3, max_new_tokens=5, seed=rng.randrange(2**31))
    runs: list[dict[int, RolloutGroup]] = []
    for peers in ([start_peer()], [start_peer(jittery), start_peer(jittery)]):
        with service_of(*peers, max_concurrent_requests=4) as service:
            runs.append({group.prompt.prompt_id: group for group in service.generate(prompts, sampling)})
            assert service.stats.requests == 21 and service.stats.completion_tokens == 105
        assert max(peer.most_active for peer in peers) <= 4
    assert runs[0] == runs[1] and runs[0].keys() == {prompt.prompt_id for prompt in prompts}
    for prompt in prompts:
        for index, trajectory in enumerate(runs[0][prompt.prompt_id].trajectories):
            seed = sample_seed(sampling.seed, prompt.prompt_id, index)
            assert [ids.tolist() for ids in trajectory.turns] == [list(expected(prompt.token_ids, seed, 5)[0])]


def test_sample_seeds() -> None:
    seeds = {sample_seed(s, p, i) for s in range(5) for p in range(50) for i in range(20)}
    assert len(seeds) == 5000 and all(0 <= seed < 2**31 for seed in seeds) and max(seeds) > 2**30
    # Fixed for ever: recorded runs must be repeatable by later versions.
    assert [sample_seed(0, 0, 0), sample_seed(1, 2, 3)] == [1137086854, 386933979]


def test_groups_come_as_they_finish(start_peer: Callable[..., Peer]) -> None:
    gate = threading.Event()

    async def behaviour(peer: Peer, payload: Answer) -> Answer:
        while payload["input_ids"] == [1] and not gate.is_set():
            await asyncio.sleep(0.01)
        return answer_to(payload)

    prompts = [Prompt(prompt_id=n, token_ids=(n,), text="") for n in (1, 2)]
    with service_of(start_peer(behaviour)) as service:
        groups = service.generate(prompts, SamplingSpec(max_new_tokens=2, num_samples=2))
        assert next(groups).prompt is prompts[1]
        gate.set()
        assert next(groups).prompt is prompts[0]
        assert next(groups, None) is None


def test_several_generate_calls_and_no_prompts(start_peer: Callable[..., Peer]) -> None:
    spec = SamplingSpec(max_new_tokens=2)
    with service_of(start_peer()) as service:
        assert list(service.generate([], spec)) == []
        for n in range(3):
            assert len(list(service.generate([Prompt(prompt_id=n, token_ids=(n,), text="")], spec))) == 1


def test_early_close_cancels_what_is_in_flight(start_peer: Callable[..., Peer], rng: random.Random) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> Answer:
        await asyncio.sleep(0 if payload["input_ids"] == [1] else 60)
        return answer_to(payload)

    peer = start_peer(behaviour)
    prompts = [Prompt(prompt_id=n, token_ids=(n,), text="") for n in range(1, 9)]
    spec = SamplingSpec(max_new_tokens=2)
    before = open_sockets()
    with service_of(peer) as service:
        groups = service.generate(prompts, spec)
        assert next(groups).prompt.prompt_id == 1
        began = time.monotonic()
        groups.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < 5
        assert eventually(lambda: peer.active == 0) and peer.disconnects == 7
        assert len(list(service.generate(prompts[:1], spec))) == 1, "the service goes on"
        abandoned = service.generate(prompts, spec)
        next(abandoned)
    assert eventually(lambda: peer.active == 0) and eventually(lambda: open_sockets() <= before)
    with pytest.raises(RuntimeError, match="closed while"):
        list(abandoned)
    with pytest.raises(RuntimeError, match="closed rollout service"):
        service.generate(prompts, spec)


def test_close_closes_the_session(start_peer: Callable[..., Peer], caplog: pytest.LogCaptureFixture) -> None:
    with service_of(start_peer()) as service:
        assert len(list(service.generate([Prompt(prompt_id=1, token_ids=(1,), text="")], SamplingSpec(max_new_tokens=2)))) == 1
    del service
    gc.collect()
    assert "Unclosed" not in caplog.text, "aiohttp reports a session that was only dropped"


def test_close_wakes_a_waiting_consumer(start_peer: Callable[..., Peer]) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> None:
        await asyncio.sleep(60)

    peer = start_peer(behaviour)
    with service_of(peer) as service:
        groups = service.generate([Prompt(prompt_id=1, token_ids=(1,), text="")], SamplingSpec(max_new_tokens=2))
        closer = threading.Thread(target=lambda: eventually(lambda: peer.active == 1) and service.close())
        closer.start()
        with pytest.raises(RuntimeError, match="closed while"):
            next(groups)
        closer.join()


def test_the_first_failure_raises_and_cancels_the_rest(start_peer: Callable[..., Peer]) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> web.StreamResponse | Answer:
        if payload["input_ids"] == [3]:
            return web.json_response({"error": {"message": "no room"}}, status=400)
        await asyncio.sleep(60)
        return answer_to(payload)

    peer = start_peer(behaviour)
    prompts = [Prompt(prompt_id=n, token_ids=(n,), text="") for n in range(6)]
    with service_of(peer) as service:
        with pytest.raises(EngineError, match=r"HTTP 400.*no room"):
            list(service.generate(prompts, SamplingSpec(max_new_tokens=2, num_samples=2)))
        assert eventually(lambda: peer.active == 0)
        assert service.stats.failures >= 1


def test_a_dead_engine_costs_nothing_but_retries(start_peer: Callable[..., Peer], rng: random.Random) -> None:
    peers = [start_peer(jittery), start_peer(jittery)]
    prompts = some_prompts(rng, 40)
    with service_of(*peers, max_concurrent_requests=8, max_retries=4) as service:
        groups = service.generate(prompts, SamplingSpec(max_new_tokens=3, num_samples=2))
        found = [next(groups)]
        peers[0].close()
        found += groups
        assert len(found) == 40 and service.stats.retries >= 1 and service.stats.failures == 0
    for group in found:
        seeds = [sample_seed(0, group.prompt.prompt_id, index) for index in range(2)]
        assert [list(one.turns[0]) for one in group.trajectories] == [expected(group.prompt.token_ids, s, 3)[0] for s in seeds]


@pytest.mark.parametrize("ids", [(), (1, VOCAB), (-3,)])
def test_bad_prompts_are_named_before_anything_is_sent(start_peer: Callable[..., Peer], ids: tuple[int, ...]) -> None:
    prompts = [Prompt(prompt_id=4, token_ids=(1,), text=""), Prompt(prompt_id=77, token_ids=ids, text="")]
    with pytest.raises(ValueError, match="prompt 77: token_ids"):
        validate_prompts(prompts, VOCAB)
    peer = start_peer()
    with service_of(peer) as service, pytest.raises(ValueError, match="prompt 77"):
        service.generate(prompts, SamplingSpec(max_new_tokens=2))
    assert peer.seen == []


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_bad_sampling_is_refused(start_peer: Callable[..., Peer], wrong: dict[str, Any], name: str) -> None:
    with service_of(start_peer()) as service, pytest.raises(ValueError, match=name):
        service.generate([Prompt(prompt_id=4, token_ids=(1,), text="")], SamplingSpec(**{"max_new_tokens": 2, **wrong}))


def test_bad_endpoints_are_refused_at_birth() -> None:
    with pytest.raises(ValueError, match="http://"):
        HttpRolloutService(["localhost:30000"], RolloutConfig(), VOCAB)
    with pytest.raises(ValueError, match=r"rollout\.endpoints"):
        HttpRolloutService([], RolloutConfig(), VOCAB)


def test_engines_may_come_later_where_somebody_looks_after_them(start_peer: Callable[..., Peer], rng: random.Random) -> None:
    peer, prompts = start_peer(), some_prompts(rng, 3)
    care = EngineCare(recover=lambda: None, report_unwell=lambda url, why: None)
    service = HttpRolloutService([], RolloutConfig(request_timeout_s=20.0), VOCAB, care=care)
    try:
        service.use([peer.url], version=0)
        found = list(service.generate(prompts, SamplingSpec(num_samples=1, max_new_tokens=2)))
    finally:
        service.close()
    assert {group.prompt.prompt_id for group in found} == {prompt.prompt_id for prompt in prompts}


def test_a_recorder_gets_each_group_in_the_order_given(
    start_peer: Callable[..., Peer], rng: random.Random, tmp_path: Path
) -> None:
    prompts, spec = some_prompts(rng, 9), SamplingSpec(num_samples=2, max_new_tokens=4)
    recorder = RolloutRecorder(tmp_path / "r.jsonl")
    service = HttpRolloutService([start_peer(jittery).url], RolloutConfig(), VOCAB, recorder)
    service.begin_step(5)
    groups = list(service.generate(prompts, spec))
    service.close()
    replay = RolloutReplay(tmp_path / "r.jsonl")
    replay.begin_step(5)
    assert list(replay.generate(prompts, spec)) == groups
