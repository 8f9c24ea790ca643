"""Two network namespaces as two hosts: runs go over the cable between them, and end with a name when it is cut."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.job import demo_overrides, make_demo
from tests.e2e.ray_job import RayNodes, RayRun
from tests.e2e.torchrun_job import Nodes
from tests.e2e.two_hosts import TwoHosts, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT_S = 20
# Time for the processes to leave after the limit, on a machine with other work to do.
SLACK_S = 60
SETTINGS = [f"run.failure_timeout_s={LIMIT_S}", "rollout.num_engines=2", "run.export_hf=false", "checkpoint.at_end=false"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    if reason := why_not():
        pytest.skip(reason)
    pair = TwoHosts()
    yield pair
    pair.close()


def wait_for_rows(run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert time.monotonic() < deadline, f"no {count} rows"
        time.sleep(0.1)


def last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-4:])


def test_torchrun(demo: Path, tmp_path: Path, hosts: TwoHosts) -> None:
    nodes = Nodes(tmp_path, [*demo_overrides(demo, tmp_path / "run", 9999), *SETTINGS, "cluster.nodes=2"], 2, hosts)
    try:
        wait_for_rows(tmp_path / "run", 2)
        for number, address in enumerate(hosts.addresses):
            assert f"http://{address}:" in (tmp_path / "run" / f"engines-{number}.json").read_text()
        hosts.cut()
        assert all(nodes.finish(LIMIT_S + SLACK_S))
        assert hosts.names[1] in last_lines(nodes.out(0)), nodes.out(0)[-3000:]
        assert hosts.names[0] in last_lines(nodes.out(1)), nodes.out(1)[-3000:]
        deadline = time.monotonic() + 30
        while left := nodes.members():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
    finally:
        for script in nodes.scripts:
            script.kill()


def test_ray(demo: Path, tmp_path: Path, hosts: TwoHosts) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    cluster = RayNodes({"num-cpus": 2}, {"num-cpus": 2}, hosts=hosts)
    arguments = [*demo_overrides(demo, tmp_path / "run", 9999), *SETTINGS, "cluster.nodes=2"]
    run = RayRun(tmp_path, tmp_path / "run", arguments, cluster.address, hosts)
    try:
        run.wait_for_step(2)
        assert f"nodes: 0 {hosts.names[0]}, 1 {hosts.names[1]}" in run.out or f"0 {hosts.names[1]}" in run.out
        began = time.monotonic()
        hosts.cut()
        assert run.finish(LIMIT_S + SLACK_S) == 1
        print(f"ended after {time.monotonic() - began:.0f} s")
        assert f"host {hosts.names[1]} (10.213.7.2) was lost" in last_lines(run.out), run.out[-3000:]
    finally:
        cluster.close()
        run.end()
