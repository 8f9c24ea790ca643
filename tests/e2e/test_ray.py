"""The Ray launcher, as a user starts it: in a cluster of its own, and in one of two "nodes" that runs already."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlx.engines.fleet import read_fleet
from rlx.obs.metrics import read_metrics
from tests.e2e.job import demo_overrides, gpu_machine, make_demo, numbers, rlx
from tests.e2e.ray_job import RayNodes, RayRun, ask_ray

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.timeout(900)
SMALL = ["run.export_hf=false", "checkpoint.at_end=false"]
Start = Callable[..., RayRun]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    cluster = RayNodes({"num-cpus": 2, "num-gpus": 4}, {"num-cpus": 2, "num-gpus": 4})
    yield cluster
    cluster.close()


@pytest.fixture
def start(demo: Path, tmp_path: Path) -> Iterator[Start]:
    runs: list[RayRun] = []

    def begin(steps: int, *settings: str, address: str = "local", name: str = "run") -> RayRun:
        arguments = [*demo_overrides(demo, tmp_path / name, steps), *settings]
        runs.append(RayRun(tmp_path, tmp_path / name, arguments, address, env=gpu_machine(tmp_path / "seen")))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()
    assert not (tmp_path / "seen").exists(), (tmp_path / "seen").read_text()


def last_lines(run: RayRun) -> list[str]:
    return run.out.splitlines()[-3:]


def is_free(nodes: RayNodes) -> bool:
    """Whether nothing of the cluster is reserved."""
    left = "ray.available_resources().get('CPU'), ray.available_resources().get('GPU')"
    groups = "[group['state'] for group in ray.util.placement_group_table().values() if group['state'] != 'REMOVED']"
    return ask_ray(nodes.address, f"{left}, {groups}") == "4.0 8.0 []"


def wait_until_free(nodes: RayNodes) -> None:
    deadline = time.monotonic() + 60
    while not is_free(nodes):
        assert time.monotonic() < deadline


def test_in_a_cluster_of_its_own(start: Start) -> None:
    run = start(2, *SMALL, "parallel.tp=1")
    run.wait_for_step(1)
    assert run.finish() == 0, run.out
    assert "on the Ray cluster of this run's own" in run.out and "rlx: done: 2 steps" in run.out
    rows = read_metrics(run.dir / "metrics.jsonl")
    assert all(row.metrics["mismatch/logprob_abs_mean"] <= 1e-4 for row in rows)
    assert not run.members()


@pytest.mark.slow
def test_same_losses_as_the_local_launcher(start: Start, nodes: RayNodes, demo: Path, tmp_path: Path) -> None:
    record = tmp_path / "rollouts.jsonl"
    run = start(3, "cluster.nodes=2", f"rollout.record={record}", "rollout.num_engines=2", address=nodes.address)
    run.wait_for_step(1)
    assert run.finish() == 0, run.out
    assert {"driver-0.log", "trainer-0.log", "trainer-1.log", "engine-0.log", "engine-1.log"} <= {
        path.name for path in (run.dir / "logs").iterdir()
    }
    assert "rlx: node 0-1: 1 trainer rank(s), 1 engine(s)" in run.out
    replayed = start(3, f"rollout.replay={record}", *SMALL, address=nodes.address, name="replayed")
    assert replayed.finish() == 0, replayed.out
    rlx("train", *demo_overrides(demo, tmp_path / "local", 3), f"rollout.replay={record}", *SMALL)
    ours = [{key: value for key, value in row.items() if not key.startswith("sync/")} for row in numbers(run.dir)]
    assert ours == numbers(tmp_path / "local") == numbers(replayed.dir)
    assert not run.members() and not replayed.members()
    wait_until_free(nodes)


@pytest.mark.slow
def test_engines_on_a_node_of_their_own_come_back(start: Start, nodes: RayNodes) -> None:
    """First the actor is killed, then the other's engine process."""
    layout = ["cluster.nodes=2", "cluster.rollout_nodes=1", "rollout.num_engines=2", "cluster.gpus_per_node=4"]
    run = start(14, *layout, *SMALL, address=nodes.address)
    run.wait_for_step(1)
    assert "rlx: node 0: [T T . .] 2 trainer rank(s), 0 engine(s)" in run.out
    assert "rlx: node 1: [A B . .] 0 trainer rank(s), 2 engine(s)" in run.out
    # The plan gives out GPUs, of which a run on CPUs sees none.
    assert re.search(r"host \S+, GPUs none\n", (run.dir / "logs" / "trainer-1.log").read_text())
    server = run.server(0)
    os.kill(run.actor("engine", 0), signal.SIGKILL)
    run.wait_for_step(4)
    os.kill(run.server(1), signal.SIGKILL)
    assert run.finish() == 0, run.out
    assert re.search(r"engine 0: the actor's process on \S+ was killed or crashed .*; restart 1 of 3", run.out)
    assert "engine 1 serves again; restart 1 of 3" in run.out
    assert not Path(f"/proc/{server}").exists()
    rows = read_metrics(run.dir / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, 15))
    assert all(row.metrics["mismatch/logprob_abs_mean"] <= 1e-4 for row in rows), "an engine served other weights"
    assert all(row.metrics["sync/version"] == row.step for row in rows)
    assert read_fleet(run.dir / "engines.json").num_restarts == 2
    wait_until_free(nodes)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_trainer_actor_ends_the_job_with_the_cause(start: Start, nodes: RayNodes, rank: int) -> None:
    run = start(9999, *SMALL, address=nodes.address)
    run.wait_for_step(2)
    os.kill(run.actor("trainer", rank), signal.SIGKILL)
    assert run.finish(120) == 1
    assert not run.members() and "could not end" not in run.out
    lines = last_lines(run)
    assert re.fullmatch(rf'rlx: FAILED trainer rank {rank} on \S+ in phase "[^"]+" of step \d+', lines[0]), lines
    assert "was killed or crashed (Ray: Worker unexpectedly exits" in lines[1]
    assert lines[2] == f"rlx: logs: {run.dir}/logs/trainer-{rank}.log"
    wait_until_free(nodes)


@pytest.mark.slow
def test_an_exception_in_a_rank_reaches_the_terminal(start: Start, nodes: RayNodes, tmp_path: Path) -> None:
    function = tmp_path / "reward.py"
    function.write_text("def score(prompt, response, label, **extra):\n    raise ZeroDivisionError('no such luck')\n")
    run = start(2, f"reward.name={function}:score", address=nodes.address)
    assert run.finish() == 1
    lines = last_lines(run)
    assert re.fullmatch(r'rlx: FAILED driver rank 0 on \S+ in phase "rollout" of step 1', lines[0]), lines
    assert "no such luck" in lines[1]
    wait_until_free(nodes)


@pytest.mark.slow
def test_a_cluster_that_lacks_resources_is_told_in_time(start: Start, nodes: RayNodes) -> None:
    began = time.monotonic()
    small = start(2, "cluster.threads_per_rank=3", "cluster.ray_wait_s=3", address=nodes.address, name="small")
    no_gpu = start(2, "cluster.nodes=1", "cluster.gpus_per_node=8", "cluster.num_trainer_ranks=6", "cluster.ray_wait_s=3",
                   address=nodes.address, name="gpus")  # fmt: skip
    nodes_lacking = start(2, "cluster.nodes=3", "cluster.num_trainer_ranks=6", "cluster.ray_wait_s=3",
                          address=nodes.address, name="nodes")  # fmt: skip
    assert [run.finish(120) for run in (small, no_gpu, nodes_lacking)] == [1, 1, 1]
    assert time.monotonic() - began < 100
    assert re.search(r"lacks CPU: the job needs 1 node\(s\) with 9 CPU; there are .*2 CPU", last_lines(small)[1])
    assert "lacks GPU and CPU: the job needs 1 node(s) with 7 GPU + 7 CPU" in last_lines(no_gpu)[1]
    assert "has too few nodes, 2 of 3" in last_lines(nodes_lacking)[1]
    holder = start(9999, *SMALL, "cluster.nodes=2", "rollout.num_engines=2", address=nodes.address, name="holder")
    holder.wait_for_step(1)
    busy = start(2, "cluster.ray_wait_s=2", "cluster.nodes=2", address=nodes.address, name="busy")
    assert busy.finish(120) == 1
    assert re.search(r"has no CPU to spare: the job needs .* there are 0 of 4 CPU free; others use the rest", last_lines(busy)[1])
    os.killpg(holder.process.pid, signal.SIGINT)
    assert holder.finish(120) == 130, holder.out[-3000:]
    assert "could not end" not in holder.out
    assert f"rlx: SIGINT: stopped; run folder: {holder.dir}" in holder.out and not holder.members()
    wait_until_free(nodes)


@pytest.mark.slow
def test_an_address_that_does_not_answer(start: Start) -> None:
    run = start(2, address="127.0.0.1:1")
    assert run.finish(100) == 2
    assert run.out.endswith("rlx: error: no Ray cluster answers at 127.0.0.1:1 (cluster.ray_address, RAY_ADDRESS)\n")
    assert not run.dir.exists()


@pytest.mark.slow
def test_interrupt_ends_a_cluster_of_its_own(start: Start) -> None:
    run = start(9999, *SMALL)
    run.wait_for_step(1)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.finish(60) == 130
    assert not run.members() and not raylets(run)


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_killed_launcher_leaves_nothing(start: Start, nodes: RayNodes, own: bool) -> None:
    run = start(9999, *SMALL, address="local" if own else nodes.address)
    run.wait_for_step(1)
    run.process.kill()
    run.process.wait()
    run.wait_until_gone(60)
    deadline = time.monotonic() + 180  # Ray's own helpers of a node look for a head that is gone before they leave
    while raylets(run):
        assert time.monotonic() < deadline, raylets(run)
        time.sleep(0.2)
    if not own:
        wait_until_free(nodes)


@pytest.mark.slow
def test_signal_saves_and_leaves_and_resume_goes_on(start: Start, nodes: RayNodes) -> None:
    run = start(9999, "run.resume=auto", "run.export_hf=false", address=nodes.address)
    run.wait_for_step(2)
    run.process.send_signal(signal.SIGTERM)  # as SIGUSR1 does
    assert run.finish(120) == 75, run.out
    done = len(numbers(run.dir))
    again = start(done + 1, "run.resume=auto", "run.export_hf=false", address=nodes.address)
    assert again.finish() == 0, again.out
    assert [row["step"] for row in numbers(again.dir)] == list(range(1, done + 2))


def raylets(run: RayRun) -> list[int]:
    """Ray's own processes of the run's process group."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == run.process.pid:
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != run.process.pid]
