"""One engine on two nodes of this machine: how its processes meet, end together and come back together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from rlx.cluster.torchrun import END_KEY
from rlx.config.load import dump_config
from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, RunConfig, SyncConfig
from rlx.engines import spanning
from rlx.engines.engine_plan import EngineSite, plan_engine
from rlx.engines.fleet import Member, read_fleet
from rlx.engines.node import Node, NodeEngines, part_path
from rlx.placement.from_config import check_spanning, seats_of
from rlx.placement.seats import PlacementError
from rlx.processes.causes import Cause
from rlx.processes.heartbeat import Pulse
from rlx.rollout.keys import EngineKeys
from rlx.rollout.sglang.server import Span
from tests.ports import free_port

SERVER = Path(__file__).with_name("dummy_server.py")
LEADER, FOLLOWER = 1, 2
SHAPE = {"model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
SHAPE |= {"num_key_value_heads": 4, "max_position_embeddings": 4096}


def config_of(folder: Path, *, engine: str = "sglang", transport: str = "auto", **rollout: object) -> Config:
    """Node 0 trains, one engine of four GPUs has the other two."""
    python = folder / "python"
    if not python.exists():
        python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nexec {sys.executable} -u {SERVER} "$@"\n')
        python.chmod(0o755)
        (folder / "config.json").write_text(json.dumps(SHAPE))
        (folder / "train.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    settings = {"start_timeout_s": 60.0, "python": str(python), **rollout}
    return Config(
        run=RunConfig(dir=str(folder / "run")),
        model=ModelConfig(path=str(folder)),
        data=DataConfig(train=str(folder / "train.jsonl")),
        reward=RewardConfig(name="exact"),
        cluster=ClusterConfig(nodes=3, rollout_nodes=2, gpus_per_node=2, num_trainer_ranks=1, device="cuda"),
        sync=SyncConfig(transport=transport),
        rollout=RolloutConfig(engine=engine, tp=4, **settings),  # type: ignore[arg-type]
    )


class Job:
    """The two nodes of the engine; ``step`` is what their owners do again and again."""

    def __init__(self, config: Config) -> None:
        self.config, self.run_dir = config, Path(config.run.dir)
        (self.run_dir / "logs").mkdir(parents=True)
        self.nodes: dict[int, NodeEngines] = {}

    def start(self, *numbers: int) -> None:
        for number in numbers:
            parts = seats_of(EngineSettings.of(self.config), self.config.parallel).parts_of(number)
            self.nodes[number] = NodeEngines(
                EngineSettings.of(self.config),
                self.run_dir,
                Node(number=number, address="127.0.0.1", num_engines=len(parts)),
                parts,
            )

    def step(self) -> list[Cause]:
        time.sleep(0.05)
        return [cause for node in self.nodes.values() if (cause := node.tick()) is not None]

    def until(self, done: Callable[[], bool], limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while not done():
            assert self.step() == [] and time.monotonic() < deadline

    def cause(self, limit_s: float = 60) -> Cause:
        deadline = time.monotonic() + limit_s
        while not (causes := self.step()):
            assert time.monotonic() < deadline
        return causes[0]

    def members(self) -> list[Member]:
        path = part_path(self.run_dir, LEADER)
        return list(read_fleet(path).members) if path.exists() else []

    def serves(self, incarnation: int) -> bool:
        return [member.incarnation for member in self.members()] == [incarnation]

    def servers(self) -> dict[int, psutil.Process]:
        """The engine's living processes by their node in it."""
        found = {}
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                is_ours = str(SERVER) in words and str(self.run_dir) in " ".join(words)
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found[int(words[words.index("--node-rank") + 1])] = process
            except psutil.Error:
                continue
        return found

    def log(self, name: str) -> str:
        return (self.run_dir / "logs" / name).read_text()

    def stop(self) -> list[int]:
        return [pid for node in self.nodes.values() for pid in node.stop()]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    started: list[Job] = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(*numbers: int, span: str = "", **rollout: object) -> Job:
        monkeypatch.setenv("DUMMY_SPAN", span)
        if span == "deaf":  # nobody else will end
            monkeypatch.setattr(spanning, "_SETTLE_S", 0.3)
        started.append(Job(config_of(tmp_path, **rollout)))
        started[-1].start(*numbers)
        return started[-1]

    yield make
    for each in started:
        each.stop()


def option(process: psutil.Process, name: str) -> str:
    words = process.cmdline()
    return words[words.index(f"--{name}") + 1]


def has_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_the_parts_meet_and_the_first_one_serves(job) -> None:
    both = job(FOLLOWER, LEADER)
    both.until(lambda: both.serves(0))
    [member] = both.members()
    servers = both.servers()
    assert sorted(servers) == [0, 1]
    assert {name: option(servers[0], name) for name in ("nnodes", "tp-size")} == {"nnodes": "2", "tp-size": "4"}
    assert option(servers[0], "dist-init-addr") == option(servers[1], "dist-init-addr")
    assert option(servers[0], "random-seed") == option(servers[1], "random-seed")
    assert option(servers[0], "config") != option(servers[1], "config")
    assert member.url == f"http://127.0.0.1:{option(servers[0], 'port')}" and member.tp == 4
    assert not part_path(both.run_dir, FOLLOWER).exists()
    assert both.log("engine-0.log").startswith("devices 0,1\n") and both.log("engine-0-node1.log").startswith("devices 0,1\n")
    grandchildren = [child for server in servers.values() for child in server.children()]
    assert len(grandchildren) == 2 and both.stop() == []
    assert both.servers() == {} and all(map(has_gone, grandchildren))


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_part_dies_the_engine_comes_back_as_a_whole(job, rank: int) -> None:
    both = job(LEADER, FOLLOWER, span="deaf", max_restarts=1)
    both.until(lambda: both.serves(0))
    before = both.servers()
    address = option(before[0], "dist-init-addr")
    before[rank].send_signal(signal.SIGKILL)
    both.until(lambda: both.serves(1))
    after = both.servers()
    assert sorted(after) == [0, 1] and all(map(has_gone, before.values()))
    assert option(after[0], "dist-init-addr") == option(after[1], "dist-init-addr") != address
    after[rank].send_signal(signal.SIGKILL)
    cause = both.cause()
    assert f"node {rank} of its 2" in cause.cause and "killed by signal 9 (SIGKILL)" in cause.cause


def test_the_one_that_died_first_is_named(job) -> None:
    both = job(LEADER, FOLLOWER, max_restarts=0)
    both.until(lambda: both.serves(0))
    both.servers()[1].send_signal(signal.SIGKILL)
    cause = both.cause()
    assert "Connection closed by peer" in both.log("engine-0.log")
    assert cause.cause.startswith("node 1 of its 2, on ") and cause.cause.endswith(": killed by signal 9 (SIGKILL)")
    assert (cause.role, cause.rank, cause.log_path.name) == ("engine", 0, "engine-0-node1.log")


def test_an_engine_that_never_serves_shows_the_part_that_failed(job) -> None:
    both = job(LEADER, FOLLOWER, span="fails 1")
    cause = both.cause()
    assert (
        "node 1 of its 2" in cause.cause and "exited with status 1" in cause.cause and cause.log_path.name == "engine-0-node1.log"
    )
    assert "MemoryError: no room for the weights" in both.nodes[LEADER].log_of(cause)


def test_a_node_that_does_not_start_its_part_is_named(job) -> None:
    alone = job(LEADER, start_timeout_s=2.0)
    cause = alone.cause()
    assert "not healthy within" in cause.cause and "of its 2 nodes, counted from 0, 1 did not start their part" in cause.cause


def test_a_taken_meeting_place_is_given_up_for_another(job, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        taken = stranger.getsockname()[1]
        ports = [free_port(), taken]  # of the check beforehand, of the first life
        monkeypatch.setattr("rlx.engines.node.free_port", lambda host: ports.pop(0) if ports else free_port())
        both = job(LEADER, FOLLOWER)
        both.until(lambda: both.serves(0))
    assert f"127.0.0.1:{taken}" not in option(both.servers()[0], "dist-init-addr")
    assert "Address already in use" in both.log("engine-0.log")


def test_whoever_takes_over_a_part_has_the_engine_begin_anew(job) -> None:
    both = job(LEADER, FOLLOWER, span="deaf", max_restarts=1)
    both.until(lambda: both.serves(0))
    before = both.servers()
    assert both.nodes.pop(FOLLOWER).stop() == []
    both.start(FOLLOWER)
    both.until(lambda: both.serves(1))
    assert sorted(both.servers()) == [0, 1] and has_gone(before[0])


@pytest.mark.slow
def test_nodes_for_engines_only_tell_the_trainers_and_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As processes, which meet a store as torchrun keeps one."""
    monkeypatch.setenv("DUMMY_SPAN", "fails 1")
    config = config_of(tmp_path)
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_config(config))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("rlx/run/0", json.dumps({"problems": [], "run_dir": str(run_dir)}))
    pulse = Pulse(TCPStore("127.0.0.1", store.port, is_master=False), 0, range(3), run="0", end=END_KEY)
    pulse.start()
    env = os.environ | {"NNODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    command = [sys.executable, "-m", "rlx.cli.engines"]
    outs = [tmp_path / f"{number}.out" for number in range(2)]
    nodes = []
    for number, path in enumerate(outs):
        with path.open("w") as out:
            own = env | {"NODE_RANK": str(number)}
            nodes.append(subprocess.Popen(command, env=own, stdout=out, stderr=subprocess.STDOUT))
    try:
        assert [node.wait(120) for node in nodes] == [1, 1]
    finally:
        pulse.stop()
        for node in nodes:
            node.kill()
    words = pulse.last_words
    assert words is not None and (words.role, words.rank) == ("engine", 0)
    assert words.log == str(run_dir / "logs" / "engine-0-node1.log")
    for out in outs:
        assert out.read_text().splitlines()[-2:] == [f"rlx: cause: {words.cause}", f"rlx: logs: {words.log}"]
    assert "    MemoryError: no room for the weights" in outs[0].read_text()


def test_files_that_are_being_replaced_are_no_files_yet(tmp_path: Path) -> None:
    assert spanning._read(spanning.Life, tmp_path / "nothing") is None
    assert spanning._read(spanning.Life, tmp_path) is None  # an OSError of another kind, as of a stale handle


def test_each_node_gives_its_own_ranks_all_its_cores_and_its_address(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_dir = tmp_path / "cpu"
    run_dir.mkdir()
    config = replace(config, cluster=ClusterConfig(device="cpu"), rollout=replace(config.rollout, tp=2))
    site = EngineSite(
        index=0,
        run_dir=run_dir,
        parent_pipe=0,
        env={"PYTHONPATH": "x", "SGLANG_GRPC_PORT": "5000", "SGLANG_RUST_SERVER": "1", "SGLANG_PORT": "6000"},
        keys=EngineKeys(),
        span=Span(rank=1, num_nodes=2, address="host:1"),
    )
    plan = plan_engine(EngineSettings.of(config), site)
    env = plan.env
    assert plan.port is not None and plan.port <= 55535
    assert not {"SGLANG_GRPC_PORT", "SGLANG_RUST_SERVER", "SGLANG_PORT"} & env.keys()  # another kind of server, shared ports
    assert env["SGLANG_HOST_IP"] == site.host
    shares = env["SGLANG_CPU_OMP_THREADS_BIND"].split("|")
    cores = {str(core) for core in os.sched_getaffinity(0)}
    assert len(shares) == 2 and shares[0] == shares[1] and set(shares[0].split(",")) == cores


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "embedded"}, "span 2 nodes, which only SGLang's servers do: set rollout.engine=sglang"),
        ({"transport": "shm"}, "sync.transport shm joins processes of one machine"),
    ],
)
def test_what_cannot_span_is_refused(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    config = config_of(tmp_path, **settings)
    with pytest.raises(PlacementError, match=words):
        check_spanning(EngineSettings.of(config), seats_of(EngineSettings.of(config), config.parallel))
    fits = config_of(tmp_path)
    check_spanning(EngineSettings.of(fits), seats_of(EngineSettings.of(fits), fits.parallel))
