"""`make demo-vision`: reward alone teaches a tiny model to name the digit that it sees, under tensor and pipeline parallelism."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from rlx.obs.metrics import read_metrics
from tests.e2e.job import ROOT, rlx

SETS = ("train", "eval", "blank")


def make_vision(folder: Path, *arguments: str) -> Path:
    command = [sys.executable, "launch/demo/make_vision.py", "--out", str(folder), *arguments]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=900)
    return folder


def train(demo: Path, run_dir: Path, *overrides: str, timeout_s: float) -> list[dict[str, float]]:
    """The metrics of each step."""
    files = [f"model.path={demo / 'model'}", f"data.train={demo / 'train.jsonl'}", f"evaluation.data={demo / 'eval.jsonl'}"]
    files += [f"evaluation.sets.blank.path={demo / 'blank.jsonl'}", f"run.dir={run_dir}"]
    rlx("train", str(ROOT / "configs" / "demo-vision.yaml"), *files, *overrides, timeout_s=timeout_s)
    return [dict(row.metrics) for row in read_metrics(run_dir / "metrics.jsonl")]


def checksums(demo: Path, name: str) -> list[str]:
    rows = [json.loads(line) for line in (demo / f"{name}.jsonl").read_text().splitlines()]
    return [hashlib.sha256((demo / file).read_bytes()).hexdigest() for row in rows for file in row["images"]]


@pytest.mark.timeout(600)
def test_two_steps_of_the_vision_demo(tmp_path: Path) -> None:
    """With a tower that was hardly taught."""
    demo = make_vision(tmp_path / "demo", "--steps", "2")
    keys = {name: checksums(demo, name) for name in SETS}
    assert len({key for found in keys.values() for key in found}) == sum(map(len, keys.values()))
    few = ["run.steps=2", "data.prompts_per_step=4", "evaluation.max_prompts=8", "run.export_hf=false", "checkpoint.at_end=false"]
    rows = train(demo, tmp_path / "run", *few, timeout_s=500)
    assert len(rows) == 2
    assert all(row["mismatch/logprob_abs_mean"] <= 1e-4 for row in rows)
    assert {"eval/reward_mean", "eval/blank/reward_mean"} <= rows[-1].keys()
    kept = {file.stem for file in (tmp_path / "run" / "images").glob("*/*.png")}
    assert len(kept) >= len(keys["train"])


@pytest.fixture(scope="module")
def vision_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision(tmp_path_factory.mktemp("vision-demo"))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("layout", ["tp", "pp"])
@pytest.mark.parametrize("learns", ["train", "frozen"])
def test_reward_alone_teaches_to_name_what_is_seen(learns: str, layout: str, vision_demo: Path, tmp_path: Path) -> None:
    other = "pp" if layout == "tp" else "tp"
    overrides = [f"model.vision={learns}", f"parallel.{layout}=2", f"parallel.{other}=1"]
    few = ["run.export_hf=false", "checkpoint.at_end=false"]
    rows = train(vision_demo, tmp_path / "run", *overrides, *few, timeout_s=1800)
    rewards = [row["reward/mean"] for row in rows]
    assert fmean(rewards[:5]) <= 0.2 and fmean(rewards[-5:]) >= 0.8, rewards
    assert rows[-1]["eval/reward_mean"] >= 0.9 and rows[-1]["eval/blank/reward_mean"] <= 0.2
    assert max(row["mismatch/logprob_abs_mean"] for row in rows) <= 1e-4
