"""`rlx sft`, `rlx dpo` and `rlx rm` on rows with images: a model learns to say whether a picture is light or dark."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from rlx.cli.main import main
from rlx.data.images.intake import ImageIntake, image_rules
from rlx.models.hf.folder import HfFolder
from rlx.obs.metrics import read_metrics
from rlx.types.rollout import ImageSpan
from tests.e2e.job import ROOT, numbers, rlx
from tests.models_vision import Picture, expand, hidden, make, save, scores, vision_of

QUESTION = "? "
NUM_HELD_OUT = 6


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and pictures of many sizes with answers and preferences, as chats and as texts."""
    folder = tmp_path_factory.mktemp("pictures")
    save(make(seed=3), folder / "model")
    answers, pairs = [], []
    for number in range(24):
        draw = np.random.default_rng(number)
        words = ("light", "dark") if number % 2 else ("dark", "light")
        height, width = draw.integers(40, 100, 2)
        levels = draw.integers(0, 60, (height, width, 3)) + 180 * (number % 2)
        Image.fromarray(levels.astype("uint8")).save(folder / f"{number}.png")
        row: dict[str, object] = {"images": [f"{number}.png"]}
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        answers.append(row | {"messages": [user, {"role": "assistant", "content": words[0]}]})
        pairs.append(row | {"prompt": f"<image>{QUESTION}", "chosen": words[0], "rejected": words[1], "response": words[0]})
    for name, rows in (("answers", answers), ("pairs", pairs), ("held-out", pairs[:NUM_HELD_OUT])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def overrides(task: Path, command: str, run_dir: Path, steps: int, *more: str) -> list[str]:
    return [
        str(ROOT / "configs" / f"{command}.yaml"),
        f"run.dir={run_dir}",
        f"run.steps={steps}",
        f"model.path={task / 'model'}",
        f"data.train={task / ('answers' if command == 'sft' else 'pairs')}.jsonl",
        f"evaluation.data={task / 'held-out.jsonl'}",
        f"evaluation.every={steps}",
        "finetune.examples_per_step=8",
        "optimizer.warmup_steps=0",
        "optimizer.schedule=constant",
        *more,
    ]


def held_out(task: Path, folder: Path, key: str, images: Path) -> list[tuple[list[int], tuple[ImageSpan, ...], int]]:
    """Token ids of what is held out with the answers of a column, their images taken in to ``images``, and the answers' lengths;
    by the tokenizer of ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    intake = ImageIntake(image_rules(str(folder), vision_of(make()), None, None), images)
    found = []
    for line in (task / "held-out.jsonl").read_text().splitlines():
        row = json.loads(line)
        image = intake.take(row["images"][0], task)
        answer = [*tokenizer(row[key])["input_ids"], tokenizer.eos_token_id]
        ids, spans = expand([Picture(image.key, image.grid), [*tokenizer(QUESTION)["input_ids"], *answer]])
        found.append((ids, spans, len(answer)))
    return found


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def test_sft_learns_goes_on_and_is_loaded_by_transformers(task: Path, tmp_path: Path) -> None:
    options = ["parallel.pp=2", "model.vision=train"]
    rlx("sft", *overrides(task, "sft", tmp_path / "whole", 3, *options, "checkpoint.at_end=false"))
    losses = [row.metrics["loss/train"] for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert losses[2] < losses[1] < losses[0] and losses[2] < losses[0] / 2
    options += ["run.resume=auto", "evaluation.every=3"]
    for steps in (2, 3):
        rlx("sft", *overrides(task, "sft", tmp_path / "parts", steps, *options, f"run.export_hf={steps == 3}".lower()))
    found, expected = numbers(tmp_path / "parts"), numbers(tmp_path / "whole")
    found[1] = {key: value for key, value in found[1].items() if not key.startswith("eval/")}
    assert found == expected

    one, other = (HfFolder(tmp_path / name / "hf") for name in ("whole", "parts"))
    assert one.files.keys() == other.files.keys() == HfFolder(task / "model").files.keys()
    model, images = load(tmp_path / "parts" / "hf"), tmp_path / "whole" / "images"
    rows = held_out(task, tmp_path / "parts" / "hf", "response", images)
    scored = [score for ids, spans, length in rows for score in scores(model, ids, spans, images)[-length:]]
    assert -sum(scored) / len(scored) == pytest.approx(expected[2]["eval/loss"], rel=1e-4)


@pytest.mark.slow
def test_preferences_are_learnt(task: Path, tmp_path: Path) -> None:
    rlx("dpo", *overrides(task, "dpo", tmp_path, 3, "parallel.tp=2"))
    rows = [row.metrics for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rows[0]["loss/train"] == pytest.approx(0.6931, abs=1e-3) and rows[2]["loss/train"] < 0.4
    assert rows[2]["eval/accuracy"] == 1.0
    before, after = load(task / "model").state_dict(), load(tmp_path / "hf").state_dict()
    assert {name for name, tensor in before.items() if torch.equal(tensor, after[name])} >= {
        name for name in before if ".visual." in name
    }, "the tower is frozen"


@pytest.mark.slow
def test_a_reward_model_scores_as_its_folder_does(task: Path, tmp_path: Path) -> None:
    options = ["parallel.tp=2", "model.vision=projector"]
    rlx("rm", *overrides(task, "rm", tmp_path / "run", 3, *options))
    rows = [row.metrics for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rows[2]["loss/train"] < rows[0]["loss/train"] and rows[2]["eval/accuracy"] == 1.0
    folder, images = tmp_path / "run" / "hf", tmp_path / "run" / "images"
    model, head = load(folder), load_file(folder / "model.safetensors")["score.weight"]
    for key in ("chosen", "rejected"):
        found = [hidden(model, ids, spans, images)[-1] @ head[0] for ids, spans, _ in held_out(task, folder, key, images)]
        assert float(torch.stack(found).mean()) == pytest.approx(rows[2][f"eval/{key}"], rel=1e-3, abs=1e-4)
    # It is a start of another one, and nothing that a server takes for a model that generates.
    again = overrides(task, "rm", tmp_path / "again", 1, *options, f"model.path={folder}")
    rlx("rm", *again)
    assert read_metrics(tmp_path / "again" / "metrics.jsonl")[0].metrics["rewards/accuracy"] > 0.9
    done = rlx("serve", "--model", str(folder), "--port", "0", check=False, timeout_s=100)
    assert done.returncode and "a reward model that sees images" in done.stderr


@pytest.mark.parametrize("command", ["sft", "dpo", "rm"])
def test_rlx_check_knows_the_tower(task: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *overrides(task, command, tmp_path / "run", 2, "parallel.tp=2", "model.vision=train")]) == 0
    told = capsys.readouterr().out
    assert "of them in the vision tower" in told and ", patches " in told
