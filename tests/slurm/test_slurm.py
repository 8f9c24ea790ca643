"""A real SLURM takes the rendered script, requeues it, and cancels it without leftovers. `make test-slurm`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlx.cli.main import main
from tests.e2e.job import demo_overrides, make_demo
from tests.slurm.cluster import Slurm, missing_programs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
START_S = 240


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)")
    if os.getuid():
        pytest.skip("starting slurmd takes root")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()
    shutil.rmtree(cluster.munge_folder)


def submit(slurm: Slurm, monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]) -> str:
    """Through ``rlx launch slurm``; the job's number."""
    for variable in ("SLURM_CONF", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, {**slurm.env, "OMP_NUM_THREADS": "1"}[variable])
    options = ["--nodes", "1", "--gpus-per-node", "0", "--partition", "test", "--name", name, "--time", "60"]
    options += ["--log-dir", str(slurm.folder / "logs"), "--threads", "1", "--pass", "SLURM_CONF", "--sbatch", "overcommit"]
    assert main(["launch", "slurm", *arguments, *options]) == 0
    return slurm.run("squeue", "-h", "-o", "%i", "--name", name)


def members(*names: str) -> list[int]:
    """Living processes that name the run's folder, or the job's."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
            if entry.name.isdigit() and any(name.encode() in command for name in names):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_until_gone(*names: str) -> None:
    deadline = time.monotonic() + 30
    while left := members(*names):
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.2)


def wait_for_rows(run_dir: Path, count: int) -> int:
    deadline = time.monotonic() + START_S
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert time.monotonic() < deadline, f"no {count} rows in {metrics}"
        time.sleep(0.1)
    return metrics.read_text().count("\n")


@pytest.mark.parametrize("flavour", ["torchrun", "ray"])
@pytest.mark.parametrize("why", ["time", "preemption"])
def test_saves_and_is_queued_again_and_the_next_start_goes_on(
    slurm: Slurm, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, why: str
) -> None:
    run_dir = tmp_path / "run"
    arguments = [*demo_overrides(demo, run_dir, 9999), "run.export_hf=false", "parallel.tp=1", "--flavour", flavour]
    job = submit(slurm, monkeypatch, f"{why}-{flavour}", arguments)
    names = (str(run_dir), f"/tmp/rlx-job-{job}/")
    wait_for_rows(run_dir, 2)
    if why == "time":
        slurm.run("scancel", "--batch", "--signal=USR1", job)  # what SLURM does when the time is nearly up
    else:
        slurm.run("sbatch", "--partition=urgent", "--exclusive", f"--output={tmp_path}/urgent.log", "--wrap", "sleep 1")
    slurm.wait_for(job, "PENDING", limit_s=START_S)
    done = (run_dir / "metrics.jsonl").read_text().count("\n")
    wait_until_gone(*names)
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
    wait_for_rows(run_dir, done + 1)
    log = (slurm.folder / "logs" / f"{job}.log").read_text()
    assert "training ended with status 75" in log and "start 2" in log
    assert ("time is nearly up: saving" in log) == (why == "time")
    assert "resumed from" in (run_dir / "logs" / "driver-0.log").read_text()
    slurm.run("scancel", job)
    assert slurm.wait_for(job, "CANCELLED", "PENDING", limit_s=START_S) == "CANCELLED"
    wait_until_gone(*names)
    # It had the time to save, and is not queued again for that.
    steps = (run_dir / "metrics.jsonl").read_text().count("\n")
    assert sorted((run_dir / "checkpoints").iterdir())[-1].name.endswith(str(steps)) and slurm.state(job) == "CANCELLED"


def test_steps_get_what_the_job_asked_for(slurm: Slurm, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prologue's settings reach the ranks; a task that does not see its data says so and starts nothing."""
    prologue = tmp_path / "prologue.sh"
    data = tmp_path / "train.jsonl"
    data.write_text((demo / "train.jsonl").read_text())
    prologue.write_text(f"export RLX_FROM_PROLOGUE=$UNSET_VARIABLE-yes\nmv {data} {data}.away\n")
    arguments = [*demo_overrides(demo, tmp_path / "run", 1), f"data.train={data}"]
    job = submit(slurm, monkeypatch, "asked", [*arguments, "--prologue", str(prologue), "--exclusive", "--mem", "0"])
    slurm.wait_for(job, "FAILED", limit_s=60)
    logs = slurm.folder / "logs"
    assert f"does not see {data}" in (logs / f"{job}-trainer-0.log").read_text()
    assert "training ended with status 2" in (logs / f"{job}.log").read_text() and not (tmp_path / "run").exists()


def test_refused_option_is_told(
    slurm: Slurm, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    options = ["--nodes", "1", "--gpus-per-node", "0", "--partition", "nowhere", "--log-dir", str(tmp_path / "logs")]
    assert main(["launch", "slurm", *demo_overrides(demo, tmp_path / "run", 2), *options]) == 1
    assert "sbatch refused" in (told := capfd.readouterr().err) and "partition" in told
