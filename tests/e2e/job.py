"""Runs ``rlx`` commands as a user does, on the demo's own files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rlx.obs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
# The clock's numbers, the engine's rounding (how requests fall into its batches depends on timing), its request counts.
NOT_REPEATED = ("perf/", "memory/", "sync/seconds", "sync/publish_s", "sync/canary", "mismatch/", "rollout/")


def gpu_machine(seen: Path) -> dict[str, str]:
    """An environment in which there seems to be a GPU; the file ``seen`` names the processes that saw it, if any."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "gpu_machine")])
    return {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0", "RLX_TEST_GPU_SEEN": str(seen)}


def rlx(
    *arguments: str, timeout_s: float = 600, check: bool = True, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``rlx ARGUMENTS`` with one thread a process; its output is in the error when it fails and ``check`` is set."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | dict(env or {})
    command = [sys.executable, "-m", "rlx.cli.main", *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def make_demo(folder: Path) -> Path:
    """The demo's model and prompts."""
    command = [sys.executable, "launch/demo/make_assets.py", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


def demo_overrides(demo: Path, run_dir: Path, steps: int) -> list[str]:
    """The demo's configuration, made small."""
    return [
        str(ROOT / "configs" / "demo.yaml"),
        f"run.dir={run_dir}",
        f"run.steps={steps}",
        f"model.path={demo / 'model'}",
        f"data.train={demo / 'train.jsonl'}",
        "evaluation.data=null",
        "data.prompts_per_step=8",
        # The demo's rate falls to 0 over run.steps; runs of different lengths must still agree step by step.
        "optimizer.schedule=constant",
        "critic_optimizer.schedule=constant",
    ]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that every run of one seed repeats bit for bit."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [
        {"step": row.step} | {key: value for key, value in row.metrics.items() if not key.startswith(NOT_REPEATED)}
        for row in rows
    ]
