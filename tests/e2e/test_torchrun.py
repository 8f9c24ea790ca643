"""torchrun starts the ranks: two "nodes" of this machine, each with its own agent, one of them with the engine."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.job import ROOT, demo_overrides, gpu_machine, make_demo, numbers, rlx
from tests.e2e.torchrun_job import Nodes

DUMMY_SERVER = ROOT / "tests" / "unit" / "cluster" / "dummy_server.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Nodes]]:
    started: list[Nodes] = []
    yield started
    for each in started:
        for script in each.scripts:
            script.kill()
        deadline = time.monotonic() + 60
        while each.members() and time.monotonic() < deadline:
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_same_losses_as_the_local_launcher(demo: Path, tmp_path: Path, nodes: list[Nodes]) -> None:
    record = tmp_path / "rollouts.jsonl"
    arguments = [*demo_overrides(demo, tmp_path / "run", 2), "checkpoint.at_end=false", f"rollout.record={record}"]
    nodes.append(Nodes(tmp_path, arguments, 2, env=gpu_machine(tmp_path / "seen")))
    assert nodes[0].finish(280) == [0, 0], nodes[0].out(0)[-3000:] + nodes[0].out(1)[-3000:]
    seen = (tmp_path / "seen").read_text().splitlines() if (tmp_path / "seen").exists() else []
    assert all("torch/distributed/run.py" in line for line in seen), seen  # torchrun's own agent looks for GPUs
    assert "rlx: done: 2 steps" in nodes[0].out(0)
    assert {"driver-0.log", "trainer-0.log", "trainer-1.log", "engine-0.log"} <= {
        path.name for path in (tmp_path / "run" / "logs").iterdir()
    }
    assert not nodes[0].members()
    rlx("train", *demo_overrides(demo, tmp_path / "local", 2), f"rollout.replay={record}", "run.export_hf=false")
    ours = [{key: value for key, value in row.items() if not key.startswith("sync/")} for row in numbers(tmp_path / "run")]
    assert ours == numbers(tmp_path / "local")


def test_wrong_configuration_is_told_once_and_starts_nothing(demo: Path, tmp_path: Path, nodes: list[Nodes]) -> None:
    nodes.append(Nodes(tmp_path, [*demo_overrides(demo, tmp_path / "run", 2), "parallel.tp=4"], 2))
    assert all(nodes[0].finish(200))
    assert "cluster.num_trainer_ranks: 2 is not a multiple of parallel.tp" in nodes[0].out(0).splitlines()[-1]
    assert "rlx: error" not in nodes[0].out(1)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_rank_that_comes_after_the_refusal_does_not_wait(demo: Path, tmp_path: Path, nodes: list[Nodes]) -> None:
    nodes.append(Nodes(tmp_path, [*demo_overrides(demo, tmp_path / "run", 2), "parallel.tp=4"], 2))
    late: list[int] = []
    while not late:
        assert all(script.poll() is None for script in nodes[0].scripts)
        late = [pid for pid in nodes[0].members() if is_worker(pid) and b"NODE_RANK=1" in environment(pid)]
    os.kill(late[0], signal.SIGSTOP)
    assert nodes[0].scripts[0].wait(200) != 0
    os.kill(late[0], signal.SIGCONT)
    assert nodes[0].scripts[1].wait(120) != 0
    assert "rank 1 on" in nodes[0].out(1) and "did not reach rank 0" in nodes[0].out(1)


@pytest.mark.slow
def test_signal_saves_and_leaves_and_resume_goes_on(demo: Path, tmp_path: Path, nodes: list[Nodes]) -> None:
    arguments = [*demo_overrides(demo, tmp_path / "run", 9999), "run.resume=auto"]
    nodes.append(Nodes(tmp_path, arguments, 2))
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline, nodes[0].out(0)[-3000:]
        time.sleep(0.1)
    nodes[0].scripts[0].send_signal(signal.SIGUSR1)
    assert sorted(nodes[0].finish(200)) == [0, 75], nodes[0].out(0)[-3000:]
    done = len(metrics.read_text().splitlines())
    assert (tmp_path / "run" / "checkpoints").is_dir()
    nodes.append(Nodes(tmp_path, [*arguments, f"run.steps={done + 1}", "run.export_hf=false"], 2))
    assert nodes[1].finish(280) == [0, 0], nodes[1].out(0)[-3000:]
    assert [row["step"] for row in numbers(tmp_path / "run")] == list(range(1, done + 2))


@pytest.mark.slow
def test_killed_engine_ends_the_job_with_its_name(demo: Path, tmp_path: Path, nodes: list[Nodes]) -> None:
    nodes.append(Nodes(tmp_path, [*demo_overrides(demo, tmp_path / "run", 9999), "rollout.max_restarts=0"], 2))
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline, nodes[0].out(0)[-3000:]
        time.sleep(0.1)
    for pid in nodes[0].members():
        if b"rlx.cli.serve" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    assert all(nodes[0].finish(200))
    last = nodes[0].out(0).splitlines()[-3:]
    assert last[0].startswith("rlx: FAILED engine rank 0 on ") and "SIGKILL" in last[1], last
    assert not nodes[0].members()


@pytest.mark.slow
def test_a_node_for_engines_that_fails_is_named_by_the_trainers(demo: Path, tmp_path: Path, nodes: list[Nodes]) -> None:
    """The engine is a stand-in that spans two nodes; its second process ends at once."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nDUMMY_SPAN="fails 1" exec {sys.executable} -u {DUMMY_SERVER} "$@"\n')
    python.chmod(0o755)
    layout = ["parallel.tp=1", "cluster.gpus_per_node=1", "cluster.rollout_nodes=2"]
    engine = ["rollout.engine=sglang", "rollout.tp=2", f"rollout.python={python}"]
    nodes.append(Nodes(tmp_path, [*demo_overrides(demo, tmp_path / "run", 2), *layout, *engine], 1, rollout_nodes=2))
    assert all(nodes[0].finish(200)) and all(each.wait(60) for each in nodes[0].engines)
    last = nodes[0].out(0).splitlines()[-3:]
    assert last[0].startswith("rlx: FAILED engine rank 0 on "), last
    assert last[1].startswith("rlx: cause: node 1 of its 2, on ") and last[1].endswith(": exited with status 1"), last
    assert last[2] == f"rlx: logs: {tmp_path / 'run' / 'logs' / 'engine-0-node1.log'}"
    assert not nodes[0].members()


def is_worker(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"\0-m\0rlx.cli.worker\0" in command and b"torch.distributed.run" not in command


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
