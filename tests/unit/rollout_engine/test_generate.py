"""What the engine generates and scores equals what transformers computes, whatever shares the batch."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlx.rollout.embedded.draws import uniform_draws
from tests.unit.rollout_engine.process import EOS, Server, random_prompts, reference_logprobs

GREEDY = {"temperature": 0, "max_new_tokens": 9, "ignore_eos": True}


def assert_logprobs(model: PreTrainedModel, prompt: list[int], answer: dict, temperature: float) -> None:
    rows = answer["meta_info"]["output_token_logprobs"]
    ids = answer["output_ids"]
    assert [row[1:] for row in rows] == [[token, None] for token in ids]
    wanted = reference_logprobs(model, prompt + ids, temperature)[len(prompt) - 1 :]
    assert [row[0] for row in rows] == pytest.approx(wanted, abs=1e-5)


def greedy_by_transformers(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_batch_of_mixed_lengths(server: Server, qwen2: PreTrainedModel) -> None:
    prompts = random_prompts(qwen2, [1, 13, 5, 37, 2, 13])
    sampling = [{**GREEDY, "max_new_tokens": count} for count in (9, 3, 11, 1, 7, 5)]
    answers = server.post("/generate", {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True})
    for prompt, params, answer in zip(prompts, sampling, answers, strict=True):
        count = params["max_new_tokens"]
        assert answer["output_ids"] == greedy_by_transformers(qwen2, prompt, count)
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": count}
        assert answer["meta_info"]["prompt_tokens"] == len(prompt)
        assert answer["meta_info"]["completion_tokens"] == count
        assert_logprobs(qwen2, prompt, answer, 1.0)


def test_logprobs_of_samples_are_temperature_scaled_before_truncation(server: Server, qwen2: PreTrainedModel) -> None:
    prompts = random_prompts(qwen2, [4, 21, 11])
    sampling = {"temperature": 0.7, "top_p": 0.8, "top_k": 11, "n": 3, "max_new_tokens": 8, "ignore_eos": True}
    answers = server.post("/generate", {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True})
    assert len(answers) == 9
    for index, answer in enumerate(answers):
        assert_logprobs(qwen2, prompts[index // 3], answer, 0.7)
    assert len({tuple(answer["output_ids"]) for answer in answers[:3]}) > 1


def test_requests_that_join_and_leave_a_running_batch(server: Server, qwen2: PreTrainedModel) -> None:
    prompts = random_prompts(qwen2, [random.randrange(1, 40) for _ in range(24)])
    counts = [random.randrange(1, 16) for _ in prompts]
    server.post("/slow_down", {"forward_sleep_time": 0.01})

    async def run() -> list[dict]:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:

            async def one(index: int) -> dict:
                await asyncio.sleep(0.012 * index)
                sampling = {"temperature": 1.3, "max_new_tokens": counts[index], "ignore_eos": True}
                body = {"input_ids": prompts[index], "sampling_params": sampling, "return_logprob": True}
                return (await client.post(server.url + "/generate", json=body)).json()

            return await asyncio.gather(*(one(index) for index in range(len(prompts))))

    for prompt, count, answer in zip(prompts, counts, asyncio.run(run()), strict=True):
        assert len(answer["output_ids"]) == count
        assert_logprobs(qwen2, prompt, answer, 1.3)


def test_scoring(server: Server, qwen2: PreTrainedModel) -> None:
    prompts = random_prompts(qwen2, [31, 1, 8])
    body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    for prompt, answer in zip(prompts, server.post("/generate", body), strict=True):
        rows = answer["meta_info"]["input_token_logprobs"]
        assert answer["output_ids"] == [] and [row[1] for row in rows] == prompt and rows[0][0] is None
        assert [row[0] for row in rows[1:]] == pytest.approx(reference_logprobs(qwen2, prompt), abs=1e-5)
    late = server.post("/generate", {**body, "input_ids": prompts[0], "logprob_start_len": 20})
    rows = late["meta_info"]["input_token_logprobs"]
    assert rows[0] == [None, prompts[0][20], None]
    assert [row[0] for row in rows[1:]] == pytest.approx(reference_logprobs(qwen2, prompts[0])[20:], abs=1e-5)


def test_seeds_fix_the_draws_whatever_shares_the_batch(server: Server, qwen2: PreTrainedModel) -> None:
    prompts = random_prompts(qwen2, [3, 17, 9])
    seed = random.randrange(2**62)
    sampling = {"temperature": 1.0, "max_new_tokens": 10, "sampling_seed": seed, "ignore_eos": True}
    together = server.post("/generate", {"input_ids": prompts, "sampling_params": {**sampling, "n": 2}})
    alone = server.post("/generate", {"input_ids": prompts[1], "sampling_params": sampling})
    second = server.post("/generate", {"input_ids": prompts[1], "sampling_params": {**sampling, "sampling_seed": seed + 1}})
    assert alone["output_ids"] == together[2]["output_ids"]
    assert second["output_ids"] == together[3]["output_ids"] != alone["output_ids"]
    # The contract of a draw: the cumulative distribution inverted at the number of (seed, position).
    tokens = prompts[1] + alone["output_ids"]
    with torch.no_grad():
        cumulative = qwen2(torch.tensor([tokens])).logits[0].double().softmax(-1).cumsum(-1)
    for position in range(len(prompts[1]), len(tokens)):
        draw = uniform_draws(np.array([seed], dtype=np.uint64), np.array([position])).item()
        below = cumulative[position - 1, tokens[position] - 1].item() if tokens[position] else 0.0
        assert below - 1e-5 <= draw <= cumulative[position - 1, tokens[position]].item() + 1e-5
    # So an answer that was cut off goes on as it would have, when prompt + part are sent with the same seed.
    part = alone["output_ids"][:4]
    rest = server.post("/generate", {"input_ids": prompts[1] + part, "sampling_params": {**sampling, "max_new_tokens": 6}})
    assert part + rest["output_ids"] == alone["output_ids"]
    free = [server.post("/generate", {"input_ids": prompts[1], "sampling_params": {"max_new_tokens": 10}}) for _ in range(3)]
    assert len({tuple(answer["output_ids"]) for answer in free}) > 1


def test_stop_tokens(server: Server, qwen2: PreTrainedModel) -> None:
    (prompt,) = random_prompts(qwen2, [6])
    free = server.post("/generate", {"input_ids": prompt, "sampling_params": GREEDY})["output_ids"]
    stop = free[3]
    cut = free.index(stop) + 1
    sampling = {"temperature": 0, "max_new_tokens": 9, "stop_token_ids": [stop]}
    answer = server.post("/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})
    if EOS not in free[:cut]:
        assert answer["output_ids"] == free[:cut]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        assert len(answer["meta_info"]["output_token_logprobs"]) == cut
    ignoring = server.post("/generate", {"input_ids": prompt, "sampling_params": {**sampling, "ignore_eos": True}})
    assert ignoring["output_ids"] == free
    # The model's own end token stops as well: draw until one comes.
    sampling = {"temperature": 8.0, "max_new_tokens": 140, "n": 30}
    reasons = [
        answer["meta_info"]["finish_reason"]
        for answer in server.post("/generate", {"input_ids": prompt, "sampling_params": sampling})
    ]
    assert {"type": "stop", "matched": EOS} in reasons


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input_ids": [3, 131]}, "131, outside the vocabulary of 131"),
        ({"input_ids": [[3], [-1, 4]]}, "-1, outside the vocabulary"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [[1], []]}, "empty"),
        ({"input_ids": [1, 2.5]}, "2.5"),
        ({"text": "hi"}, "tokenizer"),
        ({}, "exactly one of input_ids and text"),
        ({"input_ids": [1], "sampling_params": {"temprature": 1}}, "sampling_params.temprature is unknown"),
        ({"input_ids": [1], "sampling_params": {"min_p": 0.5}}, "min_p"),
        ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": "4"}}, "max_new_tokens"),
        ({"input_ids": [1] * 100, "sampling_params": {"max_new_tokens": 61}}, "context of 160"),
        ({"input_ids": [1], "stream": True}, "stream"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "rid"),
        ({"input_ids": [1], "return_logprob": True, "logprob_start_len": 1}, "logprob_start_len"),
    ],
)
def test_bad_requests_are_refused_by_name(server: Server, body: dict, says: str) -> None:
    assert says in server.post("/generate", body, status=400)["error"]["message"]


def test_description(server: Server, qwen2_folder: Path) -> None:
    for path in ("/model_info", "/get_model_info"):
        info = server.get(path)
        assert info["weight_version"] == "default" and info["vocab_size"] == 131 and info["is_generation"] is True
        assert info["model_path"] == info["tokenizer_path"] == str(qwen2_folder)
    assert "key" not in " ".join(server.get("/server_info"))
    server.get("/health")
    server.get("/health_generate")
    assert httpx.post(server.url + "/flush_cache", trust_env=False).status_code == 200
    assert httpx.post(server.url + "/generate", content=b"{", trust_env=False).status_code == 400
