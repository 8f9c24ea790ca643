"""Fine-tuning: the same loss and gradients under every layout and token budget, equal to those of transformers' own models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlx.config.schema import RewardConfig
from rlx.models.hf.folder import HfFolder
from rlx.models.hf.whole import SCORE_BIAS
from rlx.rewards.registry import make_verifier
from rlx.types.rollout import Prompt
from tests.dist.checkpoints import VOCAB_SIZE, make_qwen2
from tests.dist.launch import run_ranks
from tests.dist.test_invariance import relative
from tests.trajectories import answered, request
from tests.unit.rollout_engine.process import start_server

BETA, SMOOTHING, CENTER = 0.3, 0.1, 0.05
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "dpo": {"objective": "dpo", "beta": BETA, "label_smoothing": SMOOTHING},
    "ipo": {"objective": "ipo", "beta": BETA},
    "rm": {"objective": "rm", "center_coefficient": CENTER},
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {"layout": {}, "budgets": [44, 72, 1000]}},
    2: {
        "dp2": {"layout": {}, "budgets": [44]},
        "tp2": {"layout": {"tp": 2}, "budgets": [72]},
        "tp2 sp": {"layout": {"tp": 2, "sequence_parallel": True}, "budgets": [72]},
        "pp2": {"layout": {"pp": 2}, "budgets": [44]},
        "cp2": {"layout": {"cp": 2}, "budgets": [56]},
    },
}
# The whole batch in one micro-batch on one rank.
REFERENCE = "one, 1000 tokens"
Rows = list[tuple[dict[str, list[int]], ...]]


def sequence(draw: random.Random, prompt: int, answer: int, *turns: int) -> dict[str, list[int]]:
    """Random tokens; ``turns`` are lengths of further prompts and answers, in turn."""
    mask = [0] * prompt + [1] * answer
    for index, length in enumerate(turns):
        mask += [index % 2] * length
    return {"token_ids": [draw.randrange(VOCAB_SIZE) for _ in mask], "loss_mask": mask}


def make_rows(seed: int) -> tuple[Rows, Rows]:
    """Odd lengths, answers of one token, several turns; an odd number of pairs whose sides differ much in length."""
    draw = random.Random(seed)
    shapes = [(3, 5), (1, 1), (5, 1), (2, 13, 3, 4), (9, 4), (4, 2, 1, 1, 6, 9), (6, 3), (2, 2), (11, 6)]
    answers: Rows = [(sequence(draw, *shape),) for shape in shapes]
    pairs: Rows = []
    for prompt, chosen, rejected in [(3, 5, 9), (1, 1, 2), (7, 1, 14), (2, 13, 1), (5, 4, 4), (9, 3, 8), (4, 11, 6)]:
        sides = [sequence(draw, prompt, length) for length in (chosen, rejected)]
        sides[1]["token_ids"][:prompt] = sides[0]["token_ids"][:prompt]
        pairs.append(tuple(sides))
    return answers, pairs


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("finetune")
    answers, pairs = make_rows(seed=7)
    return {
        "model": str(make_qwen2(folder / "model", seed=1, num_layers=2)),
        "reference": str(make_qwen2(folder / "reference", seed=2, num_layers=2)),
        "answers": answers,
        "pairs": pairs,
        "objectives": OBJECTIVES,
        "folder": str(folder),
    }


@pytest.fixture(scope="module")
def results(arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    folder = Path(arguments["folder"])
    found: dict[str, dict[str, Any]] = {name: {} for name in OBJECTIVES}
    for world_size, layouts in LAYOUTS.items():
        out = folder / f"world{world_size}.pt"
        # Two pipeline stages write the reward model, one reads it: files and names of both.
        extra = {"export_to": str(folder / "rm")} if world_size == 2 else {}
        run_ranks("tests.dist.programs.finetune", world_size, arguments | {"layouts": layouts} | extra, out)
        for name, cases in torch.load(out, weights_only=True).items():
            found[name] |= cases
    return found


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_loss_and_every_gradient_agree(results: dict[str, dict[str, Any]], name: str) -> None:
    expected = results[name][REFERENCE]
    assert len(results[name]) == 8
    assert expected["numbers"]["grad_norm"] > 1e-3
    for label, found in results[name].items():
        numbers = {key: value for key, value in expected["numbers"].items() if key != "num_micro_batches"}
        for key, value in numbers.items():
            # A margin is a small difference of two scores, known to their precision.
            scale = abs(numbers["chosen"]) if key == "margin" else abs(value)
            assert found["numbers"][key] == pytest.approx(value, abs=max(1e-5 * scale, 2e-7)), (label, key)
        assert found["grads"].keys() == expected["grads"].keys()
        worst = max((relative(found["grads"][key], expected["grads"][key]), key) for key in expected["grads"])
        assert worst[0] <= 1e-5, (label, worst)


def test_budgets_cut_the_batch_differently(results: dict[str, dict[str, Any]]) -> None:
    for cases in results.values():
        counts = [cases[f"one, {budget} tokens"]["numbers"]["num_micro_batches"] for budget in (44, 72, 1000)]
        assert counts[0] > counts[1] > counts[2] == 1


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_validation_gives_the_statistics_of_the_loss(results: dict[str, dict[str, Any]], name: str) -> None:
    for label, found in results[name].items():
        for key, value in found["held_out"].items():
            assert found["numbers"][key] == pytest.approx(value, rel=1e-6, abs=1e-7), (label, key)


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """As transformers takes a batch, padded on the right; labels -100 off the answers."""
    longest = max(len(row["token_ids"]) for row in rows)

    def fill(values: list[list[int]], padding: int) -> Tensor:
        return torch.tensor([value + [padding] * (longest - len(value)) for value in values])

    labels = [[t if learnt else -100 for t, learnt in zip(row["token_ids"], row["loss_mask"], strict=True)] for row in rows]
    return {
        "input_ids": fill([row["token_ids"] for row in rows], 0),
        "attention_mask": fill([[1] * len(row["token_ids"]) for row in rows], 0),
        "labels": fill(labels, -100),
    }


def check_gradients(model: torch.nn.Module, found: dict[str, Tensor]) -> None:
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        assert grad is not None and relative(found[name], grad) <= 1e-4, name


def test_sft_is_the_loss_of_transformers(arguments: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(arguments["model"]).train()
    loss = model(**padded([row for (row,) in arguments["answers"]])).loss
    loss.backward()
    found = results["sft"][REFERENCE]
    assert found["numbers"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    check_gradients(model, found["grads"])


def answer_logprobs(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor]:
    """(sum over the answer, answer's tokens) of each row."""
    batch = padded(rows)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    mask = labels != -100
    logprobs = logits.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return torch.where(mask, logprobs, 0.0).sum(-1), mask.sum(-1)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_preferences_are_trls_loss_on_transformers_models(
    arguments: dict[str, Any], results: dict[str, dict[str, Any]], name: str
) -> None:
    policy = AutoModelForCausalLM.from_pretrained(arguments["model"]).train()
    reference = AutoModelForCausalLM.from_pretrained(arguments["reference"])
    ratios = []
    for side in (0, 1):
        rows = [pair[side] for pair in arguments["pairs"]]
        own, count = answer_logprobs(policy, rows)
        with torch.no_grad():
            other, _ = answer_logprobs(reference, rows)
        ratios.append((own - other) / count if name == "ipo" else own - other)
    logits = ratios[0] - ratios[1]
    if name == "ipo":
        loss = ((logits - 1 / (2 * BETA)) ** 2).mean()
    else:
        loss = (-F.logsigmoid(BETA * logits) * (1 - SMOOTHING) - F.logsigmoid(-BETA * logits) * SMOOTHING).mean()
    loss.backward()
    found = results[name][REFERENCE]
    numbers = found["numbers"]
    assert numbers["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert numbers["chosen"] == pytest.approx(float(BETA * ratios[0].detach().mean()), rel=1e-4)
    assert numbers["accuracy"] == pytest.approx(float((logits > 0).float().mean()))
    check_gradients(policy, found["grads"])


def test_reward_model_is_a_sequence_classifier(arguments: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    """Two ranks of a pipeline wrote the untrained model; transformers' loss on it is the one that was reported."""
    model = AutoModelForSequenceClassification.from_pretrained(Path(arguments["folder"]) / "rm").train()
    assert model.num_labels == 1
    bias = HfFolder(Path(arguments["folder"]) / "rm").read(SCORE_BIAS, 0, 0, 1)
    assert bias.tolist() == [0.0] and bias.dtype == torch.float32  # for SGLang, which would make one up
    scores = []
    for side in (0, 1):
        rows = [model(torch.tensor([pair[side]["token_ids"]])).logits[0, 0] for pair in arguments["pairs"]]
        scores.append(torch.stack(rows))
    loss = -F.logsigmoid(scores[0] - scores[1]).mean() + CENTER * ((scores[0] + scores[1]) ** 2).mean()
    loss.backward()
    found = results["rm"][REFERENCE]
    assert found["numbers"]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found["numbers"]["rejected"] == pytest.approx(float(scores[1].detach().mean()), rel=1e-4)
    check_gradients(model, found["grads"])


def test_an_engine_gives_the_scores_of_the_trainer(arguments: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    """The reward `model` asks `rlx serve` for the same pairs: prompt and answer make the sequence that was trained on."""
    server = start_server(Path(arguments["folder"]) / "rm")
    try:
        verifier = make_verifier(RewardConfig(name="model", args={"url": server.url}))
        for side, name in enumerate(("chosen", "rejected")):
            values = []
            for number, pair in enumerate(arguments["pairs"]):
                ids, start = pair[side]["token_ids"], pair[side]["loss_mask"].index(1)
                prompt = Prompt(prompt_id=number, token_ids=tuple(ids[:start]), text="", label="")
                values.append(verifier(request(prompt, "", answered(ids[:start], ids[start:]))).value)
            trainers = results["rm"][REFERENCE]["held_out"][name]
            assert sum(values) / len(values) == pytest.approx(trainers, rel=1e-5), name
    finally:
        server.process.terminate()
        assert server.process.wait(10) == 0
