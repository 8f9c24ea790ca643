"""Which nodes of a Ray cluster a job takes, and what it says when they are too few, too small or too busy."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlx.cluster.ray.address import find_cluster
from rlx.config.load import ConfigError
from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, Config, DataConfig, ModelConfig, ParallelConfig, RewardConfig, RolloutConfig
from rlx.placement.from_config import demand_of
from rlx.placement.ray_nodes import (
    LackError,
    RayNode,
    bundles_of,
    busy_text,
    own_cpus,
    plan_job,
)
from rlx.placement.seats import Demand, PlacementError
from tests.ports import free_port


def job(cluster: dict[str, object], *, tp: int = 1, num_engines: int = 1, engine_tp: int = 1) -> tuple[ClusterConfig, Demand]:
    config = Config(
        model=ModelConfig(path="nowhere"),
        data=DataConfig(train="nothing.jsonl"),
        reward=RewardConfig(name="exact"),
        cluster=ClusterConfig(launcher="ray", **cluster),
        parallel=ParallelConfig(tp=tp),
        rollout=RolloutConfig(num_engines=num_engines, tp=engine_tp),
    )
    return config.cluster, demand_of(EngineSettings.of(config), config.parallel)


def nodes(*sizes: tuple[float, float]) -> list[RayNode]:
    return [RayNode(host=f"h{number}", cpus=cpus, gpus=gpus) for number, (cpus, gpus) in enumerate(sizes)]


def test_the_fewest_nodes_that_hold_it() -> None:
    cluster, demand = job({"num_trainer_ranks": 12, "device": "cuda"}, tp=4, num_engines=2, engine_tp=2)
    seats = plan_job(cluster, demand, nodes((64, 8), (64, 8), (64, 8)))
    assert seats.machines.nodes == 3, "6 ranks a node would split a tensor-parallel group of 4"
    assert [bundle["GPU"] for bundle in bundles_of(cluster, seats)] == [6, 6, 4]


def test_one_node_is_enough_on_cpus() -> None:
    cluster, demand = job({"device": "cpu"}, tp=2)
    assert bundles_of(cluster, plan_job(cluster, demand, nodes((4, 8), (4, 8)))) == [{"CPU": 3.0}]


def test_two_small_nodes_where_one_is_too_small() -> None:
    cluster, demand = job({"device": "cpu"}, tp=2, num_engines=2)
    assert bundles_of(cluster, plan_job(cluster, demand, nodes((2, 0), (2, 0)))) == [{"CPU": 2.0}, {"CPU": 2.0}]


def test_engines_on_nodes_of_their_own_reserve_what_they_use() -> None:
    cluster, demand = job({"nodes": 3, "rollout_nodes": 1, "num_trainer_ranks": 16}, num_engines=2, engine_tp=2)
    seats = plan_job(cluster, demand, nodes((64, 8), (64, 8), (64, 8)))
    assert bundles_of(cluster, seats) == [{"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 8.0}, {"CPU": 2.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("cluster", "sizes", "told"),
    [
        ({"threads_per_rank": 8}, [(8, 0)], "lacks CPU: the job needs 1 node(s) with 16 CPU; there are h0 (0 GPU, 8 CPU)"),
        ({"nodes": 1, "gpus_per_node": 8}, [(64, 1)], "lacks GPU: the job needs 1 node(s) with 2 GPU + 2 CPU"),
        ({"nodes": 2, "num_trainer_ranks": 2}, [(8, 0)], "has too few nodes, 1 of 2: the job needs 1 node(s) with 2 CPU and 1"),
        ({"device": "cuda"}, [(8, 0)], "has no GPU: cluster.device is cuda"),
        ({}, [], "has too few nodes, 0 of 1"),
    ],
)
def test_what_the_cluster_lacks(cluster: dict[str, object], sizes: list[tuple[float, float]], told: str) -> None:
    with pytest.raises(LackError) as caught:
        plan_job(*job(cluster), nodes(*sizes))
    assert told in str(caught.value)


def test_what_no_such_cluster_could_hold_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(PlacementError, match="cannot be split evenly over 2 trainer node"):
        plan_job(*job({"nodes": 2, "num_trainer_ranks": 3}), nodes((8, 0), (8, 0)))
    with pytest.raises(PlacementError, match=r"unequal GPUs \(4 on h0, 8 on h1\)"):
        plan_job(*job({}), nodes((8, 4), (8, 8)))


def test_a_busy_cluster_is_described_by_what_is_free() -> None:
    needed = [{"CPU": 3.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 2.0}]
    text = busy_text(needed, {"CPU": 16.0, "GPU": 8.0}, {"CPU": 12.0, "GPU": 1.0})
    assert text == (
        "has no GPU to spare: the job needs 2 node(s) with 2 GPU + 3 CPU, there are 1 of 8 GPU free; others use the rest"
    )
    assert "has no such node free" in busy_text(needed, {"CPU": 16.0, "GPU": 8.0}, {"CPU": 12.0, "GPU": 4.0})


def test_a_cluster_of_our_own_declares_enough_cpus() -> None:
    assert own_cpus(*job({"threads_per_rank": 2}, tp=4), cores=2) == 10
    assert own_cpus(*job({}), cores=64) == 64


def test_which_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert find_cluster(ClusterConfig()).is_own
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
    assert find_cluster(ClusterConfig()).is_own, "what Ray remembers has ended"
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        find_cluster(ClusterConfig())
    assert find_cluster(ClusterConfig(ray_address="local")).is_own
