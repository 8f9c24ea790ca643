"""Engines that die in a run are started again, get the present weights before they serve, and no step is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rlx.engines.fleet import Held, read_fleet
from rlx.obs.log import last_phase
from rlx.obs.metrics import read_metrics
from rlx.processes.supervisor import now_text
from tests.e2e.job import ROOT, demo_overrides, make_demo
from tests.e2e.torchrun_job import Nodes

NUM_STEPS = 14


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or len((run_dir / "metrics.jsonl").read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(run_dir: Path, name: str) -> list[int]:
    """Those whose log that is."""
    log, found = str(run_dir / "logs" / f"{name}.log"), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "fd" / "1") == log:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def kill_engine(run_dir: Path, index: int) -> None:
    for pid in processes_of(run_dir, f"engine-{index}"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_engines_are_killed_and_come_back(tmp_path: Path) -> None:
    demo, run_dir = make_demo(tmp_path / "demo"), tmp_path / "run"
    overrides = [*demo_overrides(demo, run_dir, NUM_STEPS), "rollout.num_engines=2", "parallel.tp=1", "run.export_hf=false"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlx.cli.main", "train", *overrides, "checkpoint.at_end=false"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    try:
        wait_for_step(process, run_dir, 1)
        wait_for_rollout(run_dir)
        kill_engine(run_dir, 1)  # the other one goes on
        wait_for_step(process, run_dir, 4)
        wait_for_rollout(run_dir)
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


def wait_for_rollout(run_dir: Path) -> None:
    """So that the engine that is killed next has requests."""
    wait_until(lambda: last_phase((run_dir / "logs" / "driver-0.log").read_text()).name == "rollout")


@contextmanager
def frozen(run_dir: Path, rank: int, phase: str) -> Iterator[None]:
    """The trainer rank is stopped in that phase."""
    log = run_dir / "logs" / f"trainer-{rank}.log"

    def is_there() -> bool:
        return last_phase(log.read_text()).name == phase

    # Verifiers share the log; the rank itself leads its session.
    [pid] = [pid for pid in processes_of(run_dir, f"trainer-{rank}") if os.getsid(pid) == pid]
    while True:
        wait_until(is_there)
        os.kill(pid, signal.SIGSTOP)
        if is_there():
            break
        os.kill(pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def phases_since(log: Path, when: str) -> list[str]:
    lines = re.findall(r"^(\S+) \S+ PHASE step=\d+ (.+)$", log.read_text(), re.MULTILINE)
    return [name for time_text, name in lines if time_text > when]


def start_run(launcher: str, folder: Path, arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    """Two trainer ranks; under torchrun on two "nodes"."""
    if launcher == "torchrun":
        return Nodes(folder, arguments, 2).scripts
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlx.cli.main", "train", *arguments]
    with (folder / "node-0.out").open("w") as out:
        return [subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_an_engine_on_the_trainers_devices_starts_again_once_they_made_room(tmp_path: Path, launcher: str) -> None:
    """It dies while they train, and stays away; then while it generates, as the only one there is."""
    demo, run_dir = make_demo(tmp_path / "demo"), tmp_path / "run"
    arguments = [*demo_overrides(demo, run_dir, 5), "cluster.colocated=true", "cluster.offload=all", "rollout.release=all"]
    arguments += ["parallel.tp=1", "cluster.num_trainer_ranks=2", "run.export_hf=false", "checkpoint.at_end=false"]
    fleet, metrics, logs = run_dir / "engines.json", run_dir / "metrics.jsonl", run_dir / "logs"
    scripts = start_run(launcher, tmp_path, arguments)
    try:
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 1)
        with frozen(run_dir, 1, "update policy"):
            kill_engine(run_dir, 0)
            wait_until(lambda: read_fleet(fleet).held == (Held(index=0, incarnation=1),))
            time.sleep(1.0)
            assert not processes_of(run_dir, "engine-0") and read_fleet(fleet).held
            released = now_text()
        wait_until(lambda: bool(processes_of(run_dir, "engine-0")))
        for rank in (0, 1):
            phases = phases_since(logs / f"trainer-{rank}.log", released)
            assert "make room" in phases and "publish" not in phases
        wait_until(lambda: len(metrics.read_text().splitlines()) >= 2)
        wait_until(lambda: last_phase((logs / "driver-0.log").read_text()).name == "rollout")
        kill_engine(run_dir, 0)
        assert [script.wait(240) for script in scripts] == [0] * len(scripts), (tmp_path / "node-0.out").read_text()[-3000:]
    finally:
        for script in scripts:
            script.terminate()
    rows = read_metrics(metrics)
    assert [row.step for row in rows] == [1, 2, 3, 4, 5]
    assert all(row.metrics["mismatch/logprob_abs_mean"] <= 1e-4 for row in rows), "an engine served other weights"
    assert read_fleet(fleet).num_restarts == 2 and read_fleet(fleet).held == ()
