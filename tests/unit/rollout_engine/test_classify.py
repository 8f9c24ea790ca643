"""`/classify` of a reward model's folder, in the JSON that SGLang takes and gives, against transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification, PreTrainedModel

from rlx.config.schema import RewardConfig
from rlx.rewards.registry import make_verifier
from rlx.types.rollout import Prompt
from tests.trajectories import answered, request
from tests.unit.rollout_engine.process import Server, make_llama, random_prompts, start_server


@pytest.fixture(scope="module")
def reward_model() -> PreTrainedModel:
    """As `rlx rm` exports one whose padding id also ends answers: one label and no padding id."""
    config = make_llama(random.randrange(2**31)).config
    config.num_labels, config.pad_token_id = 1, None
    return LlamaForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def folder(reward_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rm")
    reward_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Iterator[Server]:
    server = start_server(folder)
    yield server
    server.process.terminate()
    assert server.process.wait(10) == 0


@torch.no_grad()
def expected(model: PreTrainedModel, rows: list[list[int]]) -> list[float]:
    return [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]


def embeddings(answer: Any) -> list[float]:
    assert all(len(row["embedding"]) == 1 for row in answer)
    return [row["embedding"][0] for row in answer]


def test_scores_are_those_of_transformers_whatever_stands_beside_a_row(scorer: Server, reward_model: PreTrainedModel) -> None:
    rows = random_prompts(reward_model, [1, 90, 2, 128, 17, 17])
    want = pytest.approx(expected(reward_model, rows), abs=1e-5)
    assert embeddings(scorer.post("/classify", {"input_ids": rows})) == want
    assert embeddings([scorer.post("/classify", {"input_ids": [row]})[0] for row in rows]) == want  # type: ignore[index]
    one: Any = scorer.post("/classify", {"input_ids": rows[1], "rid": "mine"})
    assert one["embedding"] == [pytest.approx(expected(reward_model, rows)[1], abs=1e-5)]
    meta = one["meta_info"]
    assert (meta["id"], meta["prompt_tokens"], meta["weight_version"]) == ("mine", 90, "default")
    assert meta["finish_reason"] == {"type": "length", "length": 0}


def test_what_it_cannot_answer_is_refused(scorer: Server, server: Server) -> None:
    def refusal(at: Server, path: str, body: dict[str, object]) -> str:
        answer: Any = at.post(path, body, 400)
        return str(answer["error"]["message"])

    assert "/classify" in refusal(scorer, "/generate", {"input_ids": [1, 2]})
    assert "reward model" in refusal(server, "/classify", {"input_ids": [1, 2]})
    assert "outside the vocabulary" in refusal(scorer, "/classify", {"input_ids": [[1], [97]]})
    assert "context of 128" in refusal(scorer, "/classify", {"input_ids": [1] * 129})
    assert "exactly one of" in refusal(scorer, "/classify", {})
    assert "needs a tokenizer" in refusal(scorer, "/classify", {"text": "a"})
    assert "different texts" in refusal(scorer, "/classify", {"input_ids": [[1], [2]], "rid": ["a", "a"]})
    scorer.get("/health_generate")
    assert scorer.get("/model_info")["is_generation"] is False  # type: ignore[index]


def test_the_reward_of_that_name_reads_it(scorer: Server, reward_model: PreTrainedModel) -> None:
    verifier = make_verifier(RewardConfig(name="model", args={"url": scorer.url}))
    prompt, answer = random_prompts(reward_model, [9, 5])
    asked = Prompt(prompt_id=0, token_ids=tuple(prompt), text="", label="")
    found = verifier(request(asked, "", answered(prompt, answer)))
    assert found.value == pytest.approx(expected(reward_model, [prompt + answer])[0], abs=1e-5)


def test_broken_weights_are_an_error_and_new_ones_are_taken(
    scorer: Server, reward_model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.weight": torch.full_like(weights["score.weight"], float("nan"))}, tmp_path / "model.safetensors")
    scorer.post("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "7"})
    assert "not finite" in str(scorer.post("/classify", {"input_ids": [1, 2]}, 500))
    scorer.post("/update_weights_from_disk", {"model_path": str(folder), "weight_version": "8"})
    answer: Any = scorer.post("/classify", {"input_ids": [1, 2]})
    assert answer["meta_info"]["weight_version"] == "8"
    assert answer["embedding"] == [pytest.approx(expected(reward_model, [[1, 2]])[0], abs=1e-5)]
