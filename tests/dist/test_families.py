"""Every dense family equals transformers in every layout: log-probs, gradients, and weights bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dist.family_cases import CASES
from tests.dist.launch import ROOT, run_ranks

pytestmark = pytest.mark.timeout(600)  # half a minute a world where nothing else runs

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "tp2": {"tp": 2, "recompute": "selective"},
        "tp2 sp": {"tp": 2, "sequence_parallel": True},
        "pp2": {"pp": 2, "recompute": "full"},
        "pp2 vpp2": {"pp": 2, "vpp": 2},
        "cp2": {"cp": 2},
    },
    4: {"tp2 pp2": {"tp": 2, "pp": 2, "sequence_parallel": True}, "tp4": {"tp": 4}, "pp4": {"pp": 4}},
}
# What a case does besides, and under which layouts: a checkpoint written under one is read under the others.
EXPORT, SAVE, LOAD = ["one", "tp2 pp2"], ["tp2 pp2"], ["tp4", "pp4"]
CHECKPOINTED = {"gemma2", "qwen3 one kv head", "llama biases", "phi3 128k"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints and what transformers computes from them."""
    root = tmp_path_factory.mktemp("families")
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-m", "tests.dist.family_cases", str(root)], env=env, cwd=ROOT, check=True, timeout=240)
    return root


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def results(request: pytest.FixtureRequest, root: Path) -> dict[str, Any]:
    """Layout, then case, to what was measured there."""
    out = root / f"world{request.param}.json"
    arguments = {
        "root": str(root),
        "layouts": LAYOUTS[request.param],
        "cases": {
            case: {"export": EXPORT, "save": SAVE if case in CHECKPOINTED else [], "load": LOAD if case in CHECKPOINTED else []}
            for case in CASES
        },
    }
    run_ranks("tests.dist.programs.families", request.param, arguments, out, timeout_s=500)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def over(results: dict[str, Any], what: str, limit: float) -> dict[str, Any]:
    """The cases beyond ``limit``, with the value and the place."""
    assert results and all(set(cases) == set(CASES) for cases in results.values())
    return {
        f"{case} under {layout}": measured[what]
        for layout, cases in results.items()
        for case, measured in cases.items()
        if not measured[what][0] <= limit
    }


def test_logprobs_equal_transformers(results: dict[str, Any]) -> None:
    assert over(results, "logprobs", 2e-5) == {}


def test_gradients_equal_transformers(results: dict[str, Any]) -> None:
    assert over(results, "gradients", 1e-4) == {}


@pytest.mark.parametrize("how", ["fp32", "bf16", "checkpoint"])
def test_weights_come_back_bit_for_bit(results: dict[str, Any], how: str) -> None:
    wrong = {f"{case} under {layout}": m[how] for layout, cases in results.items() for case, m in cases.items() if m[how]}
    assert wrong == {}
