"""Every algorithm learns the demo's task from reward alone, by its own recipe, as long as `make demo` runs."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from rlx.config.algorithm import PRESETS
from rlx.obs.metrics import read_metrics
from tests.e2e.job import ROOT, make_demo, rlx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("name", PRESETS)
def test_reward_alone_teaches_the_task(name: str, demo: Path, tmp_path: Path) -> None:
    recipe = "demo.yaml" if name == "ppo" else f"algorithms/{name}.yaml"
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        f"model.path={demo / 'model'}",
        f"data.train={demo / 'train.jsonl'}",
        f"evaluation.data={demo / 'eval.jsonl'}",
        "run.export_hf=false",
        "checkpoint.at_end=false",
    ]
    rlx("train", str(ROOT / "configs" / recipe), *overrides, timeout_s=1400)
    rows = [row.metrics for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    rewards = [row["reward/mean"] for row in rows]
    assert len(rows) == 60
    assert fmean(rewards[:5]) < 0.3, "the task must not be solved from the start"
    assert fmean(rewards[-5:]) >= 0.8, rewards
    assert rows[-1]["eval/reward_mean"] >= 0.9
