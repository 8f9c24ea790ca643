"""The whole job, run as a user runs it: two trainer ranks and an engine, resumed, recorded, replayed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlx.cluster.preflight import preflight
from rlx.config.load import load_config
from rlx.obs.metrics import read_metrics
from rlx.rewards.registry import make_verifier
from rlx.types.rollout import Prompt
from tests.e2e.job import ROOT, demo_overrides, gpu_machine, make_demo, numbers, rlx
from tests.trajectories import request
from tests.unit.obs.test_glossary import unexplained


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one go, recorded, on a machine that seems to have a GPU."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    record, env = run_dir.parent / "rollouts.jsonl", gpu_machine(run_dir.parent / "seen")
    rlx("train", *demo_overrides(demo, run_dir, 6), f"rollout.record={record}", "checkpoint.at_end=false", env=env)
    return run_dir


def test_run_folder_is_complete(whole: Path) -> None:
    rows = numbers(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.metrics["mismatch/logprob_abs_mean"] <= 1e-4 for row in read_metrics(whole / "metrics.jsonl"))
    assert all(row["sync/version"] == row["step"] for row in rows)
    assert {"config.yaml", "metrics.jsonl", "logs", "hf"} <= {path.name for path in whole.iterdir()}
    assert {"driver-0.log", "trainer-0.log", "trainer-1.log", "engine-0.log"} <= {
        path.name for path in (whole / "logs").iterdir()
    }
    AutoModelForCausalLM.from_pretrained(whole / "hf")
    assert not unexplained(key for row in read_metrics(whole / "metrics.jsonl") for key in row.metrics)


def test_no_process_of_a_run_on_cpus_sees_a_gpu(whole: Path) -> None:
    assert not (whole.parent / "seen").exists(), (whole.parent / "seen").read_text()


def test_resume_gives_the_same_numbers(demo: Path, whole: Path, tmp_path: Path) -> None:
    """And an evaluation of its last checkpoint those of the training's own; its export is the whole run's."""
    run_dir = tmp_path / "run"
    evaluation = [f"evaluation.data={demo / 'eval.jsonl'}", "evaluation.max_prompts=20"]
    rlx("train", *demo_overrides(demo, run_dir, 3), "run.resume=auto", "checkpoint.every=2")
    rlx("train", *demo_overrides(demo, run_dir, 6), *evaluation, "run.resume=auto", "checkpoint.every=2", "run.export_hf=false")
    rows = numbers(run_dir)
    evaluated = {key: rows[-1].pop(key) for key in list(rows[-1]) if key.startswith("eval/")}
    assert rows == numbers(whole)
    done = rlx("eval", *demo_overrides(demo, run_dir, 6), *evaluation, "run.resume=auto", "data.train=null")
    assert numbers(run_dir / "eval") == [{"step": 6, **evaluated}]
    assert f"cut_off_share  {evaluated['eval/cut_off_share']:.4f}" in done.stdout
    exported = rlx("export", str(run_dir))
    assert exported.stdout.splitlines()[-1] == str(run_dir / "hf-step-6") and "Warning" not in exported.stderr
    found, expected = load_file(run_dir / "hf-step-6" / "model.safetensors"), load_file(whole / "hf" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert {path.name for path in (run_dir / "hf-step-6").iterdir()} == {path.name for path in (whole / "hf").iterdir()}


def test_replay_needs_no_engine_and_gives_the_same_losses(demo: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    record = whole.parent / "rollouts.jsonl"
    rlx("train", *demo_overrides(demo, run_dir, 6), f"rollout.replay={record}", "run.export_hf=false")
    assert not list((run_dir / "logs").glob("engine-*"))
    expected = [{key: value for key, value in row.items() if not key.startswith("sync/")} for row in numbers(whole)]
    assert numbers(run_dir) == expected


@pytest.mark.slow
def test_grpo_on_a_pipeline_with_kl_in_the_loss(demo: Path, tmp_path: Path) -> None:
    overrides = [
        "algorithm.name=grpo",
        "parallel.tp=1",
        "parallel.pp=2",
        "algorithm.kl_placement=loss",
        "algorithm.kl_coefficient=0.1",
    ]
    rlx("train", *demo_overrides(demo, tmp_path / "run", 2), *overrides)
    rows = [row.metrics for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rows[1]["kl/ref"] != 0 and rows[1]["mismatch/logprob_abs_mean"] <= 1e-4
    assert "critic/grad_norm" not in rows[0]


def test_a_reward_function_that_raises_is_the_cause(demo: Path, tmp_path: Path) -> None:
    function = tmp_path / "reward.py"
    function.write_text("def score(prompt, response, label, **extra):\n    raise ZeroDivisionError('no such luck')\n")
    done = rlx("train", *demo_overrides(demo, tmp_path / "run", 2), f"reward.name={function}:score", check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-3:]
    assert 'FAILED driver rank 0 in phase "rollout" of step 1' in last[0]
    assert "no such luck" in last[1]


def test_bad_data_is_found_before_anything_starts(demo: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "next 1 =", "label": "2"}\n{"prompt": "next 2 =", "label"\n')
    options = [f"data.train={prompts}", "reward.name=numeric", "reward.args={tolerence: 1}"]
    done = rlx("train", *demo_overrides(demo, tmp_path / "run", 2), *options, check=False)
    assert done.returncode == 2
    assert f"{prompts}:2" in done.stderr and "tolerence" in done.stderr
    assert not (tmp_path / "run").exists()


def test_chat_without_a_template_is_refused(demo: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo / "model", model)
    for file in model.glob("*.jinja"):
        file.unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "next 1 ="}], "label": "2"}\n')
    options = [f"data.train={prompts}", f"model.path={model}"]
    done = rlx("train", *demo_overrides(demo, tmp_path / "run", 2), *options, check=False)
    assert done.returncode == 2
    assert "chat template" in done.stderr and "data.chat_template" in done.stderr


def test_first_task_of_the_docs_is_in_order(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files as they stand: the rows are written, twenty lines of configuration pass every check, the reward judges."""
    (tmp_path / ".demo").symlink_to(demo)
    (tmp_path / "my-task").mkdir()
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "first-task.md").read_text()
    for path, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", page, re.DOTALL):
        (tmp_path / path).write_text(text)
    assert len((tmp_path / "my-task" / "run.yaml").read_text().splitlines()) <= 20
    subprocess.run([sys.executable, "my-task/rows.py"], check=True)
    config = preflight(load_config("my-task/run.yaml"))
    assert config.evaluation.data is not None and config.reward.name == "my-task/reward.py:score"
    prompt = Prompt(prompt_id=0, token_ids=(1,), text="next 7 =", label="6")
    verdicts = [make_verifier(config.reward)(request(prompt, text)) for text in (" 6", " 6 7", " 8")]
    assert [verdict.value for verdict in verdicts] == [1.0, 0.5, 0.5] and verdicts[1].parts == {"right": 1.0, "short": 0.0}
