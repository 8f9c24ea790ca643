"""Engines that die in a run are started again, get the present weights before they serve, and no step is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlx.cluster.fleet import read_fleet
from rlx.obs.metrics import read_metrics
from tests.e2e.job import ROOT, demo_overrides, make_demo

NUM_STEPS = 14


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or len((run_dir / "metrics.jsonl").read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_engine(run_dir: Path, index: int) -> None:
    """SIGKILL the process whose log that is."""
    log = str(run_dir / "logs" / f"engine-{index}.log")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "fd" / "1").is_symlink():
            try:
                if os.readlink(entry / "fd" / "1") == log:
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue


def test_engines_are_killed_and_come_back(tmp_path: Path) -> None:
    demo, run_dir = make_demo(tmp_path / "demo"), tmp_path / "run"
    overrides = [*demo_overrides(demo, run_dir, NUM_STEPS), "rollout.num_engines=2", "parallel.tp=1", "run.export_hf=false"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlx.cli.main", "train", *overrides, "checkpoint.at_end=false"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    try:
        wait_for_step(process, run_dir, 1)
        kill_engine(run_dir, 1)  # the other one goes on
        wait_for_step(process, run_dir, 4)
        kill_engine(run_dir, 0)
        kill_engine(run_dir, 1)  # now nobody serves until one is back
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    assert len(re.findall(r"engine \d ended; restart", out)) >= 2
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, NUM_STEPS + 1))
    assert all(row.metrics["mismatch/logprob_abs_mean"] <= 1e-4 for row in rows), "an engine served other weights"
    assert all(row.metrics["sync/version"] == row.step for row in rows)
    assert sum(row.metrics["rollout/engines_set_aside"] + row.metrics["rollout/retries"] for row in rows) > 0
    assert read_fleet(run_dir / "engines.json").num_restarts >= 2
