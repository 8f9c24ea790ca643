"""One engine: what is sent, what is refused, faults, retries, resubmission."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from rlx.rollout.sglang.answers import Asked, EngineError, parse_completion
from rlx.rollout.sglang.client import (
    EngineClient,
    RetryPolicy,
)
from rlx.types.rollout import SamplingSpec
from tests.unit.rollout_client.peer import VOCAB, Answer, Peer, answer_to, draw, expected

URL = "http://engine:1"
ASKED = Asked(url=URL, token_ids=(4, 9), vocab_size=VOCAB, max_new_tokens=5)


@asynccontextmanager
async def client_of(peer: Peer, timeout_s: float = 20.0, **kwargs: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(peer.url, timeout_s, vocab_size=VOCAB, **kwargs)
    client.retry = RetryPolicy(max_retries=3, base_s=0.01)
    try:
        yield client
    finally:
        await client.close()


def some_prompt(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 17)))


async def test_sends_everything_explicitly_and_returns_the_answer(start_peer: Callable[..., Peer], rng: random.Random) -> None:
    peer = start_peer()
    prompt, count, seed = some_prompt(rng), rng.randint(1, 23), rng.randrange(2**31)
    spec = SamplingSpec(max_new_tokens=count, temperature=0.7, top_p=0.9, top_k=13, stop_token_ids=(3, 5))
    async with client_of(peer, api_key="k1") as client:
        got = await client.generate(prompt, spec, seed)
    tokens, logprobs = expected(prompt, seed, count, (3, 5))
    assert got.token_ids == tuple(tokens) and got.rollout_logprobs == tuple(logprobs)
    assert got.finish_reason == ("stop" if tokens[-1] in (3, 5) else "length") and got.weight_versions == (0,) * len(tokens)
    sent = peer.seen[0]
    assert sent["input_ids"] == list(prompt) and sent["return_logprob"] is True
    assert sent["sampling_params"] == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 13,
        "max_new_tokens": count,
        "stop_token_ids": [3, 5],
        "n": 1,
        "sampling_seed": seed,
    }
    assert peer.headers[0]["Authorization"] == "Bearer k1"
    assert client.stats.completion_tokens == len(tokens) and client.stats.prompt_tokens == len(prompt)


async def test_score_drops_only_the_first_token(start_peer: Callable[..., Peer], rng: random.Random) -> None:
    prompt = (*some_prompt(rng), 1, 2)
    async with client_of(start_peer()) as client:
        scores = await client.score(prompt)
        assert scores == [draw(list(prompt[:i]), 0)[1] for i in range(1, len(prompt))]
        assert await client.score((7,)) == []


@pytest.mark.parametrize("ids", [(), (1, VOCAB), (-1,), (1, 2.0), (True,)])
async def test_bad_ids_never_leave(start_peer: Callable[..., Peer], ids: tuple[Any, ...]) -> None:
    peer = start_peer()
    async with client_of(peer) as client:
        with pytest.raises(ValueError, match="token_ids"):
            await client.generate(ids, SamplingSpec(max_new_tokens=3), 0)
        with pytest.raises(ValueError, match="token_ids"):
            await client.score(ids)
    assert peer.seen == []


@pytest.mark.parametrize("fault", ["drop", "http500", "garbage", "not an object", "nan", "half"])
async def test_a_fault_is_retried_and_counted(start_peer: Callable[..., Peer], rng: random.Random, fault: str) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> web.StreamResponse | Answer | None:
        good = answer_to(payload)
        if len(peer.seen) > 2:
            return good
        if fault == "nan":
            good["meta_info"]["output_token_logprobs"][-1][0] = float("nan")
            return good
        text = {"garbage": '{"output_ids": [1,', "not an object": "[7]", "half": json.dumps(good)[:-20], "http500": "Internal"}
        return None if fault == "drop" else web.Response(text=text[fault], status=500 if fault == "http500" else 200)

    prompt = some_prompt(rng)
    async with client_of(start_peer(behaviour)) as client:
        got = await client.generate(prompt, SamplingSpec(max_new_tokens=4), 9)
    assert got.token_ids == tuple(expected(prompt, 9, 4)[0])
    assert (client.stats.requests, client.stats.retries, client.stats.failures) == (3, 2, 0)


@pytest.mark.parametrize("retries", [0, 2])
async def test_retries_are_bounded(start_peer: Callable[..., Peer], retries: int) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> web.StreamResponse:
        return web.Response(text="Internal Server Error", status=500)

    peer = start_peer(behaviour)
    async with client_of(peer) as client:
        client.retry = RetryPolicy(max_retries=retries, base_s=0.01)
        with pytest.raises(EngineError, match="HTTP 500, expected 200: Internal Server Error") as caught:
            await client.generate((1,), SamplingSpec(max_new_tokens=4), 9)
    assert peer.url in str(caught.value) and len(peer.seen) == retries + 1
    assert (client.stats.retries, client.stats.failures) == (retries, 1)


async def test_http_4xx_is_final(start_peer: Callable[..., Peer]) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too long for the context"}}, status=400)

    peer = start_peer(behaviour)
    async with client_of(peer) as client:
        with pytest.raises(EngineError, match=r"HTTP 400.*too long for the context"):
            await client.generate((1,), SamplingSpec(max_new_tokens=4), 9)
    assert len(peer.seen) == 1


async def test_time_limit(start_peer: Callable[..., Peer]) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> None:
        await asyncio.sleep(30)

    peer = start_peer(behaviour)
    began = time.monotonic()
    async with client_of(peer, timeout_s=0.3) as client:
        with pytest.raises(EngineError, match=r"limit of 0\.3 s"):
            await client.generate((1,), SamplingSpec(max_new_tokens=4), 9)
    assert 0.25 < time.monotonic() - began < 5
    assert len(peer.seen) == 1, "a lone engine that hangs must not be waited for again and again"


async def test_nobody_listens(start_peer: Callable[..., Peer]) -> None:
    peer = start_peer()
    peer.close()
    async with client_of(peer) as client:
        with pytest.raises(EngineError, match="connection failed"):
            await client.generate((1,), SamplingSpec(max_new_tokens=4), 9)
        with pytest.raises(EngineError, match="connection failed"):
            await client.health()
    assert client.stats.retries == 3


async def test_health(start_peer: Callable[..., Peer]) -> None:
    peer = start_peer()
    async with client_of(peer) as client:
        await client.health()
        peer.healthy = False
        with pytest.raises(EngineError, match="HTTP 503"):
            await client.health()


async def test_aborted_answers_are_stitched(start_peer: Callable[..., Peer], rng: random.Random) -> None:
    cuts = [rng.randint(1, 4), 0, rng.randint(1, 4), None]
    versions = ["default", "7", "8", "11"]

    async def behaviour(peer: Peer, payload: Answer) -> Answer:
        turn = len(peer.seen) - 1
        answer = answer_to(payload, versions[turn], cuts[turn])
        if cuts[turn] == 0:  # aborted in the queue: SGLang leaves lists out
            del answer["output_ids"], answer["meta_info"]["output_token_logprobs"]
        return answer

    peer = start_peer(behaviour)
    prompt, count, seed = some_prompt(rng), 9 + rng.randint(0, 6), rng.randrange(2**31)
    async with client_of(peer) as client:
        got = await client.generate(prompt, SamplingSpec(max_new_tokens=count), seed)
    tokens, logprobs = expected(prompt, seed, count)
    assert got.token_ids == tuple(tokens) and got.rollout_logprobs == tuple(logprobs) and got.finish_reason == "length"
    first, third = cuts[0] or 0, cuts[2] or 0
    assert got.weight_versions == (0,) * first + (8,) * third + (11,) * (count - first - third)
    assert [each["sampling_params"]["max_new_tokens"] for each in peer.seen] == [
        count,
        count - first,
        count - first,
        count - first - third,
    ]
    assert peer.seen[3]["input_ids"] == [*prompt, *tokens[: first + third]]
    assert len({each["rid"] for each in peer.seen}) == 4
    assert (client.stats.resubmissions, client.stats.retries, client.stats.completion_tokens) == (3, 0, count)


@pytest.mark.parametrize("stop", [True, False])
async def test_an_abort_on_the_last_token_is_not_resubmitted(start_peer: Callable[..., Peer], stop: bool) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> Answer:
        answer = answer_to(payload)
        answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted", "status_code": None}
        return answer

    peer = start_peer(behaviour)
    tokens, _ = expected((1, 2), 5, 6)
    stops = (tokens[2],) if stop else ()
    async with client_of(peer) as client:
        got = await client.generate((1, 2), SamplingSpec(max_new_tokens=6, stop_token_ids=stops), 5)
    assert got.finish_reason == ("stop" if stop else "length") and len(peer.seen) == 1
    assert got.token_ids == tuple(expected((1, 2), 5, 6, stops)[0])


async def test_aborts_without_progress_end(start_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    async def behaviour(peer: Peer, payload: Answer) -> Answer:
        return answer_to(payload, abort_after=0)

    monkeypatch.setattr("rlx.rollout.sglang.client._MAX_ABORTS_WITHOUT_TOKENS", 3)
    peer = start_peer(behaviour)
    async with client_of(peer) as client:
        with pytest.raises(EngineError, match="aborted one sequence 4 times"):
            await client.generate((1,), SamplingSpec(max_new_tokens=4), 9)
    assert len(peer.seen) == 4


def span(version: str, start: int, end: int) -> Answer:
    return {"version": version, "start": start, "end": end}


def test_each_token_has_the_version_that_wrote_it() -> None:
    """In the stretches that today's SGLang lists; where there are none, all have that of the answer."""
    answer = broken("meta_info.weight_versions", [span("default", 0, 2), span("8", 2, 2), span("11", 2, 5)])
    assert parse_completion(answer, ASKED).weight_versions == (0, 0, 11, 11, 11)
    answer = broken("meta_info.weight_version", "8")
    assert parse_completion(answer, ASKED).weight_versions == (8,) * 5


def good_answer() -> Answer:
    payload = {
        "input_ids": [4, 9],
        "sampling_params": {"max_new_tokens": 5, "stop_token_ids": [], "sampling_seed": 1},
    }
    return answer_to(payload)


def broken(path: str, value: Any) -> Answer:
    """A good answer with one field (dots and indices in ``path``) replaced, or removed when ``value`` is Ellipsis."""
    answer = copy.deepcopy(good_answer())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = answer
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return answer


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("output_ids", ..., "output_ids is None, expected a list"),
        ("output_ids", [], "at least one token"),
        ("output_ids.1", VOCAB, f"output_ids holds {VOCAB}, expected an int in 0..{VOCAB - 1}"),
        ("output_ids.1", -1, "output_ids holds -1"),
        ("output_ids.1", "3", "output_ids holds '3'"),
        ("output_ids.1", True, "output_ids holds True"),
        ("output_ids", [1] * 6, "at most max_new_tokens = 5"),
        ("meta_info", None, "meta_info is None, expected an object"),
        ("meta_info.output_token_logprobs", ..., "output_token_logprobs is None"),
        ("meta_info.output_token_logprobs.0", ..., "output_token_logprobs has 4 entries, expected 5"),
        ("meta_info.output_token_logprobs.2.0", float("-inf"), r"output_token_logprobs\[2\] has log-prob -inf"),
        ("meta_info.output_token_logprobs.2.0", None, r"\[2\] has log-prob None"),
        ("meta_info.output_token_logprobs.2.0", 0.5, r"\[2\] has log-prob 0.5"),
        ("meta_info.output_token_logprobs.3.1", 210.5, r"\[3\] is .* expected \[logprob, \d+"),
        ("meta_info.output_token_logprobs.3", [-1.0], r"\[3\] is \[-1.0\]"),
        ("meta_info.weight_version", ..., "weight_version is None"),
        ("meta_info.weight_version", "v7", "weight_version is 'v7'"),
        ("meta_info.weight_versions", "3", "weight_versions is '3', expected a list"),
        ("meta_info.weight_versions", [], "tells of 0 tokens, expected 5"),
        ("meta_info.weight_versions", [span("3", 0, 4)], "tells of 4 tokens, expected 5"),
        ("meta_info.weight_versions", [span("3", 1, 5)], "expected a stretch that begins at 0 and ends by 5"),
        ("meta_info.weight_versions", [span("3", 0, 2), span("4", 3, 5)], r"\[1\] .* begins at 2 and ends by 5"),
        ("meta_info.weight_versions", [span("3", 0, 3), span("4", 3, 2)], r"\[1\] .* begins at 3 and ends by 5"),
        ("meta_info.weight_versions", [span("3", 0, 6)], r"\[0\] .* ends by 5"),
        ("meta_info.weight_versions", [span("v3", 0, 5)], "version is 'v3'"),
        ("meta_info.weight_versions", [["3", 0, 5]], r"weight_versions\[0\] is .* expected an object"),
        ("meta_info.prompt_tokens", 3, "prompt_tokens is 3, but 2 tokens were sent: it read another prompt"),
        ("meta_info.prompt_tokens", ..., "prompt_tokens is None"),
        ("meta_info.finish_reason", None, "finish_reason is None"),
        ("meta_info.finish_reason.type", "bored", "expected stop, length or abort"),
    ],
)
def test_a_bad_answer_names_url_field_and_expectation(path: str, value: Any, message: str) -> None:
    assert len(parse_completion(good_answer(), ASKED).token_ids) == 5
    with pytest.raises(EngineError, match=message) as caught:
        parse_completion(broken(path, value), ASKED)
    assert str(caught.value).startswith(URL)


def test_an_error_dressed_as_abort_is_an_error() -> None:
    reason = {"type": "abort", "message": "input too long", "status_code": 400}
    with pytest.raises(EngineError, match="status 400: input too long") as caught:
        parse_completion(broken("meta_info.finish_reason", reason), ASKED)
    assert not caught.value.retryable


async def test_backoff_grows_to_its_cap_with_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(delay: float) -> None:
        waits.append(delay)

    async def attempt() -> None:
        raise EngineError(URL, "down")

    monkeypatch.setattr("rlx.rollout.sglang.client.asyncio.sleep", sleep)
    client = EngineClient(URL, 1.0, vocab_size=3)
    with pytest.raises(EngineError):
        await replace(client.retry, max_retries=6, base_s=1.0, cap_s=10.0).run(attempt, client.stats)
    for wait, full in zip(waits, [1, 2, 4, 8, 10, 10], strict=True):
        assert full / 2 <= wait <= full
