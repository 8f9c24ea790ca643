"""Kill -9 each kind of process of a real run: the rest ends soon, the last lines say who failed where, nothing remains."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
MARK = "RLX_KILL_TEST"
START_LIMIT_S = 240
END_LIMIT_S = 15
STEP = r'in phase "[^"]+" of step (\d+)'


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    subprocess.run([sys.executable, str(ROOT / "launch/demo/make_assets.py"), "--out", str(folder)], check=True)
    return folder


class Run:
    """The demo, small and long, as a user starts it. Everything it starts inherits a mark in its environment."""

    def __init__(self, folder: Path, assets: Path) -> None:
        self.dir = folder / "run"
        self._mark = str(folder)
        self._err = folder / "stderr"
        overrides = [f"run.dir={self.dir}", "run.steps=9999", "data.prompts_per_step=4", "evaluation.data=null"]
        overrides += ["rollout.max_restarts=0"]
        overrides += [f"model.path={assets / 'model'}", f"data.train={assets / 'train.jsonl'}"]
        command = [sys.executable, "-m", "rlx.cli.main", "train", str(ROOT / "configs/demo.yaml"), *overrides]
        env = os.environ | {MARK: self._mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self._err.open("w") as err:
            self.launcher = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=err)

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for_step(self, step: int) -> None:
        metrics = self.dir / "metrics.jsonl"
        deadline = time.monotonic() + START_LIMIT_S
        while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
            assert self.launcher.poll() is None, self.err
            assert time.monotonic() < deadline, "the run did not begin"
            time.sleep(0.1)

    def members(self) -> list[psutil.Process]:
        """All living processes of the run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def listening_ports(self) -> set[int]:
        connections = [connection for process in self.members() for connection in process.net_connections("inet")]
        return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}

    def victim(self, name: str) -> int:
        if name == "launcher":
            return self.launcher.pid
        log = str(self.dir / "logs" / f"{name}.log")
        [pid] = [child.pid for child in psutil.Process(self.launcher.pid).children() if is_open(child.pid, log)]
        return pid

    def end(self) -> None:
        for process in self.members():
            process.kill()
        self.launcher.wait(10)


def is_open(pid: int, path: str) -> bool:
    """Whether the process writes its standard output there."""
    return os.readlink(f"/proc/{pid}/fd/1") == path


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def run(tmp_path: Path, assets: Path) -> Iterator[Run]:
    started = Run(tmp_path, assets)
    yield started
    started.end()


@pytest.mark.parametrize("name", ["driver-0", "trainer-0", "trainer-1", "engine-0", "launcher"])
def test_kill(run: Run, name: str) -> None:
    run.wait_for_step(2)
    ports = run.listening_ports()
    assert ports, "the engine at least listens"
    os.kill(run.victim(name), signal.SIGKILL)
    began = time.monotonic()
    while (left := run.members()) or any(answers(port) for port in ports):
        assert time.monotonic() - began < END_LIMIT_S, left
        time.sleep(0.1)
    print(f"{name}: all ended after {time.monotonic() - began:.1f} s")
    assert run.launcher.wait(1) == (-signal.SIGKILL if name == "launcher" else 1)
    check_last_lines(run, name, run.err.splitlines()[-3:])


def check_last_lines(run: Run, name: str, lines: list[str]) -> None:
    if name == "launcher":
        found = re.fullmatch(rf"rlx: FAILED launcher \(pid {run.launcher.pid}\) died while the driver was {STEP}", lines[0])
    else:
        role, _, rank = name.partition("-")
        found = re.fullmatch(rf"rlx: FAILED {role} rank {rank} {STEP}", lines[0])
        assert lines[1] == "rlx: cause: killed by signal 9 (SIGKILL)"
        assert lines[2] == f"rlx: logs: {run.dir}/logs/{name}.log"
    assert found is not None, lines
    assert int(found[1]) >= 2
