"""Whole runs whose stock SGLang engine spans two nodes of this machine; one of its processes is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlx.engines.fleet import read_fleet
from rlx.obs.metrics import read_metrics
from tests.e2e.job import demo_overrides, make_demo
from tests.e2e.ray_job import RayNodes, RayRun
from tests.e2e.torchrun_job import Nodes
from tests.e2e.two_hosts import TwoHosts, why_not
from tests.sglang.conftest import needs_sglang
from tests.sglang.engines import sglang_python

pytestmark = [pytest.mark.sglang, pytest.mark.slow, needs_sglang, pytest.mark.timeout(900)]
# As many as outlast the moments in which an engine whose actor was killed still serves.
STEPS, LIMIT_S = 40, 500
LAYOUT = ["parallel.tp=1", "cluster.num_trainer_ranks=1", "cluster.gpus_per_node=1", "cluster.rollout_nodes=2"]
SMALL = ["run.export_hf=false", "checkpoint.at_end=false", "algorithm.name=grpo", "cluster.threads_per_rank=1"]


def arguments(folder: Path) -> list[str]:
    engine = ["rollout.engine=sglang", "rollout.tp=2", f"rollout.python={sglang_python()}"]
    engine.append("rollout.server_args={max_total_tokens: 8192}")
    return [*demo_overrides(make_demo(folder / "demo"), folder / "run", STEPS), *LAYOUT, *SMALL, *engine]


def wait_for_step(run_dir: Path, step: int, told: Callable[[], str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def kill_part(run_dir: Path, rank: int) -> None:
    word = str(run_dir / "engines" / f"keys-0-node{rank}.yaml")
    [found] = [each for each in psutil.process_iter(["cmdline"]) if word in (each.info["cmdline"] or [])]
    os.kill(found.pid, signal.SIGKILL)


def check(run_dir: Path) -> None:
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    assert all(row.metrics["mismatch/logprob_abs_mean"] <= 1e-4 for row in rows), "the engine served other weights"
    assert read_fleet(run_dir / "engines.json").num_restarts == 1
    assert {"engine-0.log", "engine-0-node1.log"} <= {path.name for path in (run_dir / "logs").iterdir()}


@pytest.fixture(params=["one host", "two hosts"])
def hosts(request: pytest.FixtureRequest) -> Iterator[TwoHosts | None]:
    """The trainer and the engine's first process are on the first one."""
    if request.param == "one host":
        yield None
        return
    if reason := why_not():
        pytest.skip(reason)
    pair = TwoHosts(own_memory=True)
    yield pair
    pair.close()


def test_torchrun(tmp_path: Path, hosts: TwoHosts | None) -> None:
    nodes = Nodes(tmp_path, arguments(tmp_path), 1, hosts, rollout_nodes=2)
    try:
        wait_for_step(tmp_path / "run", 1, lambda: nodes.out(0)[-3000:])
        kill_part(tmp_path / "run", 1)
        assert nodes.finish(LIMIT_S) == [0], nodes.out(0)[-3000:]
        assert [each.wait(60) for each in nodes.engines] == [0, 0], nodes.engine_outs[0].read_text()[-3000:]
        check(tmp_path / "run")
        address = json.loads((tmp_path / "run" / "engines" / "span-0.json").read_text())["address"]
        assert address.startswith(f"{hosts.addresses[0] if hosts else '127.0.0.1'}:")
        assert not nodes.members()
    finally:
        for process in (*nodes.scripts, *nodes.engines):
            process.kill()


@pytest.mark.parametrize("victim", ["server", "actor"])
def test_ray(tmp_path: Path, victim: str) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    cluster = RayNodes(*[{"num-cpus": 2, "num-gpus": 1}] * 3)
    run = RayRun(tmp_path, tmp_path / "run", [*arguments(tmp_path), "cluster.nodes=3"], cluster.address)
    try:
        run.wait_for_step(1, LIMIT_S)
        assert "part of an engine on 2 nodes" in run.out
        if victim == "server":
            kill_part(run.dir, 1)
        else:
            os.kill(run.actor("engine", 0, 1), signal.SIGKILL)
        assert run.finish(LIMIT_S) == 0, run.out[-3000:]
        check(run.dir)
        assert not run.members()
    finally:
        run.end()
        cluster.close()
