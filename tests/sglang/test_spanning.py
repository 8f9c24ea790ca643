"""A stock SGLang engine whose two processes belong to two "nodes" of this machine: weights and scores, and a part's death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig
from rlx.engines.fleet import Member, read_fleet, run_keys
from rlx.engines.node import Node, NodeEngines, part_path
from rlx.placement.from_config import seats_of
from rlx.rollout.sglang.control import EngineControl
from tests.sglang.conftest import needs_sglang
from tests.sglang.engines import engine_config
from tests.sglang.models import make, scores
from tests.sglang.publishers import canary_of, make_publisher
from tests.sglang.test_protocol import TOLERANCE, weights, worst

pytestmark = [pytest.mark.sglang, needs_sglang, pytest.mark.timeout(900)]
LEADER, FOLLOWER = 1, 2
START_S = 700


class SpanningEngine:
    """Engine 0 of a run whose node 0 would train; what tests ask of a ``RunningEngine``."""

    kind, tp = "sglang", 2

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self._run_dir = model, folder / "run"
        (self._run_dir / "logs").mkdir(parents=True)
        config = engine_config("sglang", model, self._run_dir, tp=self.tp)
        cluster = ClusterConfig(device="cpu", threads_per_rank=1, nodes=3, rollout_nodes=2, gpus_per_node=1)
        config = replace(config, cluster=cluster, rollout=replace(config.rollout, max_restarts=1, start_timeout_s=600))
        self.keys = run_keys(self._run_dir)
        settings = EngineSettings.of(config)
        seats = seats_of(settings, config.parallel)
        self._nodes = [
            NodeEngines(settings, self._run_dir, Node(number=number, address="127.0.0.1", num_engines=1), seats.parts_of(number))
            for number in (FOLLOWER, LEADER)
        ]

    def wait(self, incarnation: int = 0) -> SpanningEngine:
        deadline = time.monotonic() + START_S
        while [member.incarnation for member in self._members()] != [incarnation]:
            assert time.monotonic() < deadline, self.log
            causes = [cause for node in self._nodes if (cause := node.tick()) is not None]
            assert not causes, (causes, self.log)
            time.sleep(0.2)
        return self

    @property
    def url(self) -> str:
        return self._members()[0].url

    @property
    def log(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted((self._run_dir / "logs").iterdir()))

    def control(self, timeout_s: float = 60) -> EngineControl:
        return EngineControl(self.url, timeout_s=timeout_s, keys=self.keys)

    def part(self, rank: int) -> int:
        """The process of one node of the engine."""
        word = f"keys-0-node{rank}.yaml"
        [found] = [each.pid for each in psutil.process_iter() if word in " ".join(_command(each))]
        return found

    def stop(self) -> None:
        assert [pid for node in self._nodes for pid in node.stop()] == []

    def _members(self) -> list[Member]:
        path = part_path(self._run_dir, LEADER)
        return list(read_fleet(path).members) if path.exists() else []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def spanning(first_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpanningEngine]:
    engine = SpanningEngine(first_weights, tmp_path_factory.mktemp("spanning"))
    try:
        yield engine.wait()
    finally:
        engine.stop()


def publish(engine: SpanningEngine, seed: int, version: int) -> None:
    model = make("llama", seed)
    publisher = make_publisher(engine, model, canary_of(lambda rows, images: [scores(model, row) for row in rows]))
    try:
        publisher.publish(version, weights(model))
    finally:
        publisher.close()
    control = engine.control()
    assert control.weight_version() == str(version)
    assert worst(engine, model) < TOLERANCE
    control.close()


def test_weights_reach_the_ranks_of_both_nodes(spanning: SpanningEngine) -> None:
    assert worst(spanning, make("llama", 1)) < TOLERANCE
    for seed, version in ((41, 3), (42, 4)):
        publish(spanning, seed, version)


@pytest.mark.slow
def test_it_comes_back_when_a_part_dies(spanning: SpanningEngine) -> None:
    leader = spanning.part(0)
    os.kill(spanning.part(1), signal.SIGKILL)
    spanning.wait(incarnation=1)
    assert not psutil.pid_exists(leader) and worst(spanning, make("llama", 1)) < TOLERANCE
    publish(spanning, 43, 5)
