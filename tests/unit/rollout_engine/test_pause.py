"""Pausing, aborting and going on, with SGLang's semantics."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedModel

from tests.unit.rollout_engine.process import Server, make_qwen2, random_prompts, reference_logprobs, save

SAMPLING = {"temperature": 1.0, "max_new_tokens": 60, "ignore_eos": True}


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def in_flight(server: Server) -> int:
    return server.get("/server_info")["num_in_flight"]


@pytest.fixture
def long_request(server: Server, qwen2: PreTrainedModel):
    """Start requests that take 60 slow steps; returns (prompt, future) of each."""
    with ThreadPoolExecutor() as pool:

        def start(**more: object) -> tuple[list[int], Future]:
            server.post("/slow_down", {"forward_sleep_time": 0.02})
            (prompt,) = random_prompts(qwen2, [random.randrange(2, 12)])
            before = in_flight(server)
            body = {"input_ids": prompt, "sampling_params": SAMPLING, "return_logprob": True, **more}
            future = pool.submit(server.post, "/generate", body)
            wait_until(lambda: in_flight(server) > before)
            return prompt, future

        yield start
        server.post("/slow_down", {"forward_sleep_time": None})
        server.post("/abort_request", {"abort_all": True})


def test_pause_abort_answers_what_runs_and_holds_what_comes(server, qwen2, long_request) -> None:
    (prompt, running) = long_request()
    time.sleep(0.2)
    assert server.post("/pause_generation", {}) == {"message": "Generation paused successfully.", "status": "ok"}
    answer = running.result(1)
    count = len(answer["output_ids"])
    assert 0 < count < 60
    reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    assert answer["meta_info"]["finish_reason"] == reason
    rows = answer["meta_info"]["output_token_logprobs"]
    wanted = reference_logprobs(qwen2, prompt + answer["output_ids"])[len(prompt) - 1 :]
    assert [row[0] for row in rows] == pytest.approx(wanted, abs=1e-5)

    _, held = long_request()
    server.get("/health")
    server.get("/health_generate")
    server.get("/model_info")
    server.post("/pause_generation", {"mode": "abort"})
    time.sleep(0.2)
    assert not held.done()
    server.post("/slow_down", {"forward_sleep_time": None})
    server.post("/continue_generation", {})
    assert held.result(20)["meta_info"]["finish_reason"]["type"] == "length"
    server.post("/pause_generation", {"mode": "stop"}, status=400)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
@pytest.mark.parametrize("update", [False, True])
def test_paused_requests_go_on_without_stale_key_values(server, qwen2, long_request, tmp_path: Path, mode, update) -> None:
    started = [long_request() for _ in range(3)]
    time.sleep(0.15)
    server.post("/pause_generation", {"mode": mode})
    # What is retracted holds nothing in the cache, as in today's SGLang.
    assert httpx.post(server.url + "/flush_cache", trust_env=False).status_code == (200 if mode == "retract" else 400)
    after = qwen2
    if update:
        after = make_qwen2(random.randrange(2**31))
        body = {"model_path": str(save(after, tmp_path)), "weight_version": "9"}
        assert server.post("/update_weights_from_disk", body)["success"] is True
    server.post("/slow_down", {"forward_sleep_time": None})
    server.post("/continue_generation", {})
    for prompt, future in started:
        answer = future.result(20)
        assert len(answer["output_ids"]) == 60
        found = [row[0] for row in answer["meta_info"]["output_token_logprobs"]]
        old, new = (reference_logprobs(m, prompt + answer["output_ids"])[len(prompt) - 1 :] for m in (qwen2, after))
        # A first part by the old weights, then all by the new ones.
        cut = next(i for i in range(61) if found[i:] == pytest.approx(new[i:], abs=1e-5))
        assert cut < 60 and found[:cut] == pytest.approx(old[:cut], abs=1e-5)
        assert answer["meta_info"]["num_retractions"] == (1 if update or mode == "retract" else 0)
        meta = answer["meta_info"]
        assert meta["weight_version"] == ("9" if update else "default")
        stretches = [("default", 0, cut), ("9", cut, 60)] if update else [("default", 0, 60)]
        assert meta["weight_versions"] == [{"version": v, "start": start, "end": end} for v, start, end in stretches]


def test_abort_request_needs_the_exact_id(server, long_request) -> None:
    _, ten = long_request(rid="a-10")
    _, other = long_request(rid="b")
    for rid in ("a-1", "", "a-100"):
        server.post("/abort_request", {"rid": rid})
    duplicate = {"input_ids": [1], "rid": "b"}
    assert "'b'" in server.post("/generate", duplicate, status=400)["error"]["message"]
    time.sleep(0.1)
    assert not ten.done()
    server.post("/abort_request", {"rid": "a-10"})
    assert ten.result(1)["meta_info"]["finish_reason"]["type"] == "abort" and ten.result()["meta_info"]["id"] == "a-10"
    assert not other.done()
    server.post("/abort_request", {"abort_all": True})
    assert other.result(1)["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_client_that_hangs_up_frees_its_place(server: Server) -> None:
    server.post("/slow_down", {"forward_sleep_time": 0.05})
    with pytest.raises(httpx.TimeoutException):
        httpx.post(server.url + "/generate", json={"input_ids": [9], "sampling_params": SAMPLING}, timeout=0.3, trust_env=False)
    began = time.monotonic()
    wait_until(lambda: in_flight(server) == 0)
    assert time.monotonic() - began < 1


def test_an_update_waits_for_requests_in_flight_unless_told_to_abort_them(server, long_request, qwen2_folder: Path) -> None:
    body = {"model_path": str(qwen2_folder), "weight_version": "3"}
    with ThreadPoolExecutor() as pool:
        _, running = long_request()
        update = pool.submit(server.post, "/update_weights_from_disk", body)
        time.sleep(0.1)
        _, behind = long_request()
        assert not update.done() and httpx.post(server.url + "/flush_cache", trust_env=False).status_code == 400
        answer = running.result(20)
        assert answer["meta_info"]["finish_reason"]["type"] == "length"
        assert answer["meta_info"]["weight_version"] == "default"
        assert update.result(5)["success"] is True
        aborting = server.post("/update_weights_from_disk", {**body, "weight_version": "4", "abort_all_requests": True})
        assert aborting["success"] is True
        assert behind.result(1)["meta_info"]["finish_reason"]["type"] == "abort"
        assert server.get("/model_info")["weight_version"] == "4"
