"""Ray clusters of several "nodes" on this machine, and runs in them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlx.processes.children import JOB_ID
from rlx.processes.rundir import log_path
from tests.e2e.job import ROOT
from tests.e2e.two_hosts import TwoHosts
from tests.ports import free_port

START_S = 120.0
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class RayNodes:
    """A head and further nodes, each ``{"num-cpus": 2, ...}``; processes of this test that end with ``close``."""

    def __init__(self, *nodes: dict[str, int], hosts: TwoHosts | None = None) -> None:
        self._hosts = hosts
        self._folder = Path(tempfile.mkdtemp(prefix="rlx-ray-"))  # pytest's own paths are too long for sockets
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.address = f"{hosts.addresses[0] if hosts else '127.0.0.1'}:{free_port()}"
        head = ["--head", f"--port={self.address.split(':')[1]}", f"--temp-dir={self._folder}", "--include-dashboard=false"]
        try:
            self.nodes.append(self._start(head, nodes[0]))
            wait_for_nodes(self.address, 1, hosts)
            for node in nodes[1:]:
                self.nodes.append(self._start([f"--address={self.address}"], node))
                wait_for_nodes(self.address, len(self.nodes), hosts)  # two that start at once take the same socket
        except BaseException:
            self.close()
            raise

    def _start(self, arguments: Sequence[str], has: dict[str, int]) -> subprocess.Popen[bytes]:
        shares = [f"--{name}={count}" for name, count in has.items()]
        number = len(self.nodes)
        address = self._hosts.addresses[number] if self._hosts else "127.0.0.1"
        common = ["--block", f"--node-ip-address={address}", "--disable-usage-stats", f"--object-store-memory={80 * 2**20}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *common, *shares]
        command = self._hosts.command(number, command) if self._hosts else command
        with (self._folder / "start.log").open("ab") as log:
            # The GPUs that Ray is only told of must not be hidden from it.
            env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | TOKEN
            return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def ask_ray(address: str, expression: str, hosts: TwoHosts | None = None) -> str:
    """What a Ray driver of its own sees; empty when it cannot join."""
    program = f"import ray; ray.init({address!r}, logging_level='ERROR', log_to_driver=False); print({expression})"
    command = [sys.executable, "-c", program]
    command = hosts.command(0, command) if hosts else command
    done = subprocess.run(command, env=os.environ | TOKEN, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip()


def wait_for_nodes(address: str, count: int, hosts: TwoHosts | None) -> None:
    deadline = time.monotonic() + START_S
    while ask_ray(address, "sum(node['Alive'] for node in ray.nodes())", hosts) != str(count):
        assert time.monotonic() < deadline, f"{count} Ray nodes did not start"


class RayRun:
    """``rlx train`` with the Ray launcher, in a process group of its own as a shell would start it."""

    def __init__(
        self,
        folder: Path,
        run_dir: Path,
        arguments: Sequence[str],
        address: str = "local",
        hosts: TwoHosts | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.dir = run_dir
        self._out = folder / f"{run_dir.name}.out"
        self._jobs: set[bytes] = set()
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | ({} if address == "local" else TOKEN) | dict(env or {})
        settings = ["cluster.launcher=ray", f"cluster.ray_address={address}"]
        command = [sys.executable, "-m", "rlx.cli.main", "train", *arguments, *settings]
        command = hosts.command(0, command) if hosts else command
        with self._out.open("w") as out:
            self.process = subprocess.Popen(
                command, env=own, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    def finish(self, limit_s: float = 280) -> int:
        return self.process.wait(limit_s)

    def wait_for_step(self, step: int, limit_s: float = 240) -> None:
        metrics = self.dir / "metrics.jsonl"
        deadline = time.monotonic() + limit_s
        while not metrics.exists() or metrics.read_text().count("\n") < step:
            assert self.process.poll() is None, self.out[-3000:]
            assert time.monotonic() < deadline, self.out[-3000:]
            time.sleep(0.1)
        self.members()

    def members(self) -> list[int]:
        """Living processes of the run's job, the launcher aside; call it while the run lives to learn the job's mark."""
        environments = dict(_environments())
        for pid, environment in environments.items():
            if _output(pid).startswith(f"{self.dir}/logs/"):
                self._jobs |= {entry for entry in environment if entry.startswith(f"{JOB_ID}=".encode())}
        return [pid for pid, environment in environments.items() if self._jobs & set(environment)]

    def actor(self, role: str, rank: int, node: int = 0) -> int:
        """The process of an actor."""
        log = str(log_path(self.dir, role, rank, node))
        found = [pid for pid in self.members() if _output(pid) == log and _command(pid).startswith(b"ray::")]
        assert len(found) == 1, (log, found)
        return found[0]

    def server(self, index: int) -> int:
        """The process of an engine itself."""
        log = f"{self.dir}/logs/engine-{index}.log"
        [found] = [pid for pid in self.members() if _output(pid) == log and b"rlx.cli.serve" in _command(pid)]
        return found

    def wait_until_gone(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while left := self.members():
            assert time.monotonic() < deadline, [(pid, _command(pid)) for pid in left]
            time.sleep(0.2)

    def end(self) -> None:
        """Whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.members():
            os.kill(pid, signal.SIGKILL)


def _environments() -> list[tuple[int, list[bytes]]]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append((int(entry.name), (entry / "environ").read_bytes().split(b"\0")))
        except OSError:
            continue
    return found


def _output(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return ""


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
