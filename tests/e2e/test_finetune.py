"""`rlx sft`, `rlx dpo` and `rlx rm`, run as a user runs them on the demo's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlx.cli.main import main
from rlx.obs.metrics import read_metrics
from tests.e2e.job import ROOT, make_demo, numbers, rlx
from tests.e2e.torchrun_job import Nodes


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


def overrides(demo: Path, command: str, run_dir: Path, steps: int) -> list[str]:
    """The command's configuration on the demo's files in ``demo``."""
    name = "answers" if command == "sft" else "preferences"
    return [
        str(ROOT / "configs" / f"{command}.yaml"),
        f"run.dir={run_dir}",
        f"run.steps={steps}",
        f"model.path={demo / 'model'}",
        f"data.train={demo / f'{name}.jsonl'}",
        f"evaluation.data={demo / f'held-out-{name}.jsonl'}",
    ]


def held_out(demo: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (demo / "held-out-preferences.jsonl").read_text().splitlines()]


def check_answers(model_dir: Path, demo: Path) -> float:
    """Share of the held-out questions that the model answers right, greedily."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    rows = held_out(demo)
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits[:, -1].argmax(-1)
    right = [tokenizer.decode(int(token)) == row["chosen"] for token, row in zip(best, rows, strict=True)]
    return sum(right) / len(right)


CONSTANT = ("evaluation.every=30", "optimizer.schedule=constant")


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty steps of supervised fine-tuning in one go."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = rlx("sft", *overrides(demo, "sft", run_dir, 60), *CONSTANT, "checkpoint.at_end=false")
    assert "rlx: loss: +" in done.stdout and "held-out loss" in done.stdout
    return run_dir


@pytest.mark.slow
def test_sft_learns(demo: Path, whole: Path) -> None:
    rows = [row.metrics for row in read_metrics(whole / "metrics.jsonl")]
    assert rows[0]["loss/train"] > 2.5 and rows[-1]["loss/train"] < 0.4
    assert rows[29]["eval/loss"] > rows[59]["eval/loss"] and rows[59]["data/epochs"] == pytest.approx(60 * 32 / 1000)
    assert check_answers(whole / "hf", demo) >= 0.9
    assert not list((whole / "logs").glob("engine-*"))


@pytest.mark.slow
def test_sft_resumes_bit_for_bit(demo: Path, whole: Path, tmp_path: Path) -> None:
    options = [*CONSTANT, "run.resume=auto", "checkpoint.every=20", "run.export_hf=false"]
    rlx("sft", *overrides(demo, "sft", tmp_path, 25), *options)
    rlx("sft", *overrides(demo, "sft", tmp_path, 60), *options)
    # The first part also validates at its end, in step 25.
    found, expected = numbers(tmp_path), numbers(whole)
    assert {key for key in found[24] if key not in expected[24]} == {"eval/loss", "eval/entropy"}
    found[24] = {key: value for key, value in found[24].items() if not key.startswith("eval/")}
    assert found == expected


def test_what_cannot_run_is_found_before_anything_starts(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, run_dir = tmp_path / "pairs.jsonl", tmp_path / "run"
    pairs.write_text('{"prompt": "next 1 =", "chosen": "2", "rejected": "2"}\n' * 3)
    assert main(["dpo", *overrides(demo, "dpo", run_dir, 2), f"data.train={pairs}"]) == 2
    assert "data.train: " in (told := capsys.readouterr().err) and "(equal_sides 3)" in told
    pairs.write_text('{"prompt": "next 1 =", "chosen": "2"}\n')
    assert main(["rm", *overrides(demo, "rm", run_dir, 2), f"evaluation.data={pairs}"]) == 2
    assert f"evaluation.data: {pairs}:1: no column 'rejected'" in capsys.readouterr().err
    assert main(["train", *overrides(demo, "sft", run_dir, 2)]) == 2
    assert "finetune.objective: sft is not for rlx train; use rlx sft" in capsys.readouterr().err
    assert main(["sft", *overrides(demo, "dpo", run_dir, 2), "finetune.objective=ipo"]) == 2
    assert "use rlx dpo" in capsys.readouterr().err
    assert not run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.pp=2", "parallel.cp=2"])
@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_preferences_are_learnt(demo: Path, tmp_path: Path, objective: str, layout: str) -> None:
    rlx("dpo", *overrides(demo, "dpo", tmp_path, 300), f"finetune.objective={objective}", layout)
    rows = [row.metrics for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rows[0]["rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["rewards/accuracy"] == pytest.approx(1.0) and rows[-1]["eval/accuracy"] == pytest.approx(1.0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.slow
def test_sft_then_dpo_still_answers(demo: Path, tmp_path: Path) -> None:
    rlx("sft", *overrides(demo, "sft", tmp_path / "sft", 100))
    start = [f"model.path={tmp_path / 'sft' / 'hf'}", "optimizer.lr=2e-4"]
    rlx("dpo", *overrides(demo, "dpo", tmp_path / "dpo", 50), *start)
    assert check_answers(tmp_path / "dpo" / "hf", demo) == 1.0


@pytest.mark.slow
def test_reward_model_scores_as_transformers_loads_it(demo: Path, tmp_path: Path) -> None:
    rlx("rm", *overrides(demo, "rm", tmp_path / "run", 300), "parallel.tp=2", "finetune.center_coefficient=0.01")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1].metrics
    assert last["rewards/accuracy"] >= 0.9 and last["eval/accuracy"] >= 0.9

    folder = tmp_path / "run" / "hf"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    rows = held_out(demo)

    def scores(key: str) -> Tensor:
        texts = [row["prompt"] + row[key] + tokenizer.eos_token for row in rows]
        with torch.no_grad():
            found: Tensor = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
        return found

    chosen, rejected = scores("chosen"), scores("rejected")
    assert float((chosen > rejected).float().mean()) == pytest.approx(last["eval/accuracy"])
    assert float(chosen.mean()) == pytest.approx(last["eval/chosen"], rel=1e-4)

    # Its checkpoint has the head too: for an evaluation alone, and for an export that is the final one.
    options = [*overrides(demo, "rm", tmp_path / "run", 300), "finetune.center_coefficient=0.01", "run.resume=auto"]
    rlx("eval", *options, "data.train=null")
    evaluated = {key: value for key, value in last.items() if key.startswith("eval/")}
    assert numbers(tmp_path / "run" / "eval")[0] == pytest.approx({"step": 300} | evaluated)
    rlx("export", str(tmp_path / "run"), "--out", str(tmp_path / "exported"))
    found, expected = load_file(tmp_path / "exported" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    # Its own export is a start: the head comes along.
    rlx("rm", *overrides(demo, "rm", tmp_path / "again", 1), f"model.path={folder}", "finetune.center_coefficient=0.01")
    first = read_metrics(tmp_path / "again" / "metrics.jsonl")[0].metrics
    assert first["rewards/accuracy"] >= 0.9 and first["loss/train"] < 0.2


@pytest.mark.slow
def test_epochs_become_steps_and_torchrun_gives_the_same(demo: Path, tmp_path: Path) -> None:
    options = [*overrides(demo, "sft", tmp_path / "local", 7), "finetune.epochs=0.1", "finetune.examples_per_step=30"]
    rlx("sft", *options)
    assert [row["step"] for row in numbers(tmp_path / "local")] == [1, 2, 3, 4]
    nodes = Nodes(tmp_path, [*options, f"run.dir={tmp_path / 'torchrun'}"], 2)
    try:
        assert nodes.finish(280) == [0, 0], nodes.out(0)[-3000:]
    finally:
        for script in nodes.scripts:
            script.kill()
    assert "rlx: done: 4 steps" in nodes.out(0)
    assert numbers(tmp_path / "torchrun") == numbers(tmp_path / "local")
