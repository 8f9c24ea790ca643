"""A run under ``launch/torchrun.sh`` on several "nodes" of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.e2e.job import ROOT
from tests.e2e.two_hosts import TwoHosts
from tests.ports import free_port

MARK = "RLX_TORCHRUN_TEST"


class Nodes:
    """The nodes' scripts as processes, and ``rlx.cli.engines`` of nodes for engines only; everything they start inherits a
    mark in its environment."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        num_nodes: int,
        hosts: TwoHosts | None = None,
        rollout_nodes: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.mark, self._outs = str(folder), [folder / f"node-{number}.out" for number in range(num_nodes)]
        shared = os.environ | {
            "MASTER_ADDR": hosts.addresses[0] if hosts else "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "NNODES": str(num_nodes),
        }
        shared |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self.mark} | dict(env or {})
        self.scripts = []
        for number, path in enumerate(self._outs):
            with path.open("w") as out:
                command = [str(ROOT / "launch" / "torchrun.sh"), *arguments]
                command = hosts.command(number, command) if hosts else command
                env = shared | {"NODE_RANK": str(number), "NPROC_PER_NODE": "1"}
                self.scripts.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT))
        self.engines = []
        self.engine_outs = [folder / f"engines-{number}.out" for number in range(rollout_nodes)]
        for number, path in enumerate(self.engine_outs):
            with path.open("w") as out:
                command = [sys.executable, "-m", "rlx.cli.engines", *arguments]
                command = hosts.command(number, command) if hosts else command
                env = shared | {"NODE_RANK": str(number)}
                self.engines.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT))

    def out(self, number: int) -> str:
        return self._outs[number].read_text()

    def finish(self, limit_s: float = 240) -> list[int]:
        """The nodes' exit statuses."""
        deadline = time.monotonic() + limit_s
        return [script.wait(max(0.1, deadline - time.monotonic())) for script in self.scripts]

    def members(self) -> list[int]:
        """Living processes of the run."""
        found = []
        marker = f"{MARK}={self.mark}".encode()
        for entry in Path("/proc").iterdir():
            try:
                if marker in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except (OSError, ValueError):
                continue
        return found
