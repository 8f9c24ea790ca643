"""Stock SGLang and everything that trainers need in one environment, SGLang's own packages (torch, transformers) first."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from rlx.obs.metrics import read_metrics
from tests.e2e.job import ROOT, demo_overrides, make_demo
from tests.sglang.conftest import needs_sglang
from tests.sglang.engines import sglang_python

pytestmark = [pytest.mark.sglang, pytest.mark.slow, needs_sglang, pytest.mark.timeout(900)]
STEPS = 2
SMALL = ["parallel.tp=1", "algorithm.name=grpo", "run.export_hf=false", "checkpoint.at_end=false"]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its interpreter. Nothing is installed: it looks into SGLang's environment and then into this one."""
    folder = tmp_path_factory.mktemp("both")
    venv.create(folder, symlinks=True)
    ask = [str(sglang_python()), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    first = subprocess.run(ask, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    own = [path for path in sys.path if path.endswith("site-packages")]
    [site] = folder.glob("lib/python3*/site-packages")
    (site / "both.pth").write_text("\n".join([str(ROOT), first, *own]) + "\n")
    return folder / "bin" / "python"


def rlx(python: Path, *arguments: str) -> str:
    command = [str(python), "-m", "rlx.cli.main", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_doctor_finds_both(python: Path) -> None:
    found = {line.split()[1]: line.split()[0] for line in rlx(python, "doctor").splitlines()}
    assert found["sglang"] == found["megatron-core"] == found["torch"] == found["transformers"] == "ok"


@pytest.mark.parametrize("engine", ["embedded", "sglang"])
def test_a_run_has_one_interpreter(python: Path, tmp_path: Path, engine: str) -> None:
    overrides = demo_overrides(make_demo(tmp_path / "demo"), tmp_path / "run", STEPS)
    rlx(python, "train", *overrides, *SMALL, f"rollout.engine={engine}")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    assert all(row.metrics["mismatch/logprob_abs_mean"] <= 1e-4 for row in rows), "the engine served other weights"
