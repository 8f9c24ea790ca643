"""The engine without HTTP: bounded batches, and what happens when the model fails."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlx.rollout.embedded.engine import Engine
from rlx.rollout.embedded.images import Shown
from rlx.rollout.embedded.model import LanguageModel
from rlx.rollout.embedded.sequence import SamplingParams, Sequence
from rlx.types.precision import BF16, FP32
from tests.unit.rollout_engine.process import Server, make_qwen2, random_prompts, reference_logprobs, save


def sequence(prompt: list[int], max_new_tokens: int) -> Sequence:
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0, top_k=-1, stop_ids=frozenset(), seed=random.randrange(2**40)
    )
    return Sequence(rid=str(random.random()), prompt=prompt, params=params, return_logprob=True)


@pytest.fixture
def engine(qwen2_folder: Path) -> Iterator[Engine]:
    engine = Engine(LanguageModel(qwen2_folder, FP32, "cpu"), max_running=3)
    engine.start()
    yield engine
    engine.close()
    assert engine.join(5)


def test_more_sequences_than_fit_wait_for_their_turn(engine: Engine, qwen2: PreTrainedModel) -> None:
    sequences = [sequence(prompt, random.randrange(1, 9)) for prompt in random_prompts(qwen2, [3, 9, 1, 22, 4, 4, 15])]
    engine.submit(sequences).result(30)
    assert engine.in_flight == 0
    for one in sequences:
        assert one.finish == {"type": "length", "length": one.params.max_new_tokens}
        wanted = reference_logprobs(qwen2, one.prompt + one.output_ids)[len(one.prompt) - 1 :]
        assert one.output_logprobs == pytest.approx(wanted, abs=1e-5)


def test_a_model_that_fails_fails_every_request_and_ends_the_engine(engine: Engine) -> None:
    told: list[bool] = []
    engine.on_failure = lambda: told.append(True)
    engine.model.module.lm_head.weight.data = torch.zeros(131, 3)  # no longer fits the hidden size
    first = sequence([9, 10], 5)
    engine.submit([first]).result(30)
    assert first.error is not None and "the engine failed" in first.error
    assert engine.join(5) and told == [True] and not engine.alive
    with pytest.raises(RuntimeError, match="the engine failed"):
        engine.submit([sequence([9], 1)])


def test_closing_answers_whoever_waits(engine: Engine) -> None:
    engine.step_delay_s = 0.02
    running = sequence([9, 11], 150)
    answered = engine.submit([running])
    behind = engine.call_exclusive(lambda: None)
    engine.close()
    answered.result(5)
    assert running.finish is not None and running.finish["type"] == "abort"
    assert isinstance(behind.exception(5), RuntimeError)


def test_weights_that_are_not_finite_give_an_error_instead_of_tokens(server: Server, tmp_path: Path) -> None:
    broken = make_qwen2(4)
    broken.model.norm.weight.data[5] = float("nan")
    server.post("/update_weights_from_disk", {"model_path": str(save(broken, tmp_path))})
    for count in (0, 3):
        body = {"input_ids": [9, 8, 12], "sampling_params": {"max_new_tokens": count}}
        answer = server.post("/generate", {**body, "return_logprob": True, "logprob_start_len": 0}, status=500)
        assert "not finite" in answer["error"]["message"]
    server.get("/health")


def test_logits_of_a_bf16_model_can_be_kept_in_fp32(qwen2: PreTrainedModel, qwen2_folder: Path) -> None:
    model = LanguageModel(qwen2_folder, BF16, "cpu")
    model.keep_logits_in_fp32()
    [prompt] = random_prompts(qwen2, [19])
    logits, key_values = model.prefill([Shown(prompt)], all_logits=True)
    reference = type(qwen2).from_pretrained(qwen2_folder, dtype=torch.bfloat16)
    with torch.no_grad():
        body = reference.base_model(torch.tensor([prompt])).last_hidden_state
        wanted = body.double() @ reference.lm_head.weight.double().t()
    assert logits.dtype == torch.float32 and float((logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert model.decode(np.array([9]), key_values).dtype == torch.float32
