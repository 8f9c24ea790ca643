"""Whole runs of a model that sees, on rows with none, one and two images: engines and trainers agree on every token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import expected_shapes
from rlx.obs.metrics import read_metrics
from tests.e2e.job import ROOT, rlx
from tests.models_vision import make, save
from tests.sglang.conftest import needs_sglang
from tests.sglang.engines import sglang_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 2


def write_rows(folder: Path) -> Path:
    """Photographs of many sizes, which nobody has brought to the model's grid yet."""
    rows = []
    for number in range(18):
        draw = np.random.default_rng(number)
        names = [f"{number}-{each}.png" for each in range(number % 3)]
        for name in names:
            height, width = draw.integers(30, 150, 2)
            Image.fromarray(draw.integers(0, 255, (height, width, 3)).astype("uint8")).save(folder / name)
        row = {"prompt": "look " + "<image> and " * len(names) + "say", "label": "1"}
        rows.append(row | ({"images": names} if names else {}))
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("engine", ["embedded", pytest.param("sglang", marks=[pytest.mark.sglang, needs_sglang])])
@pytest.mark.parametrize(("layout", "learns"), [("parallel.tp=2", "train"), ("parallel.pp=2", "frozen")])
def test_engines_and_trainers_see_the_same(tmp_path: Path, engine: str, layout: str, learns: str) -> None:
    """The tower has moved before the second step's answers, and before the canary of each."""
    model, run = save(make(seed=3), tmp_path / "model"), tmp_path / "run"
    where = [f"run.dir={run}", f"model.path={model}", f"data.train={write_rows(tmp_path)}", f"rollout.engine={engine}"]
    sizes = ["data.prompts_per_step=6", "data.max_prompt_tokens=300", "rollout.max_new_tokens=12", f"run.steps={STEPS}"]
    rest = [
        "algorithm.name=grpo",
        "evaluation.data=null",
        "run.export_hf=false",
        "checkpoint.at_end=false",
        "sync.canary_every=1",
    ]
    if engine == "sglang":
        rest += [f"rollout.python={sglang_python()}", "rollout.server_args={mem_fraction_static: 0.3, max_total_tokens: 8192}"]
    rlx("train", str(ROOT / "configs" / "demo.yaml"), "parallel.tp=1", layout, f"model.vision={learns}", *where, *sizes, *rest)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row.metrics["mismatch/logprob_abs_mean"] < 1e-5 and row.metrics["sync/canary_difference"] < 1e-5
        assert row.metrics["sync/canary_doubts"] == 0
    shapes = expected_shapes(read_architecture(model))
    sent = {name: shape for name, shape in shapes.items() if learns == "train" or not name.startswith("visual.")}
    assert {row.metrics["sync/bytes"] for row in rows} == {4 * sum(map(math.prod, sent.values()))}
