"""Runs one command on N ranks of this machine, with torchrun's environment variables, and ends them together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from rlx.processes.environment import QUIET
from rlx.processes.threads import thread_variables
from rlx.sync.ports import free_port

_POLL_S = 0.1


def run_local_ranks(command: Sequence[str], num_ranks: int) -> int:
    """Run ``command`` as ranks 0 .. num_ranks - 1; returns 0 when all do.

    The first rank that fails decides the exit status; the others are then ended. Ranks never outlive this call.
    """
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    threads = thread_variables(None, os.environ, num_ranks)
    shared = {"GLOO_SOCKET_IFNAME": "lo", **QUIET, **os.environ, **threads, **world}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_ranks):
            ranks.append(subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
        while True:
            codes = [process.poll() for process in ranks]
            failed = next((code for code in codes if code), None)
            if failed is not None:
                return 1 if failed < 0 else failed
            if all(code == 0 for code in codes):
                return 0
            time.sleep(_POLL_S)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def this_module(module: str, *arguments: str) -> list[str]:
    """The command line that runs ``module`` in this interpreter."""
    return [sys.executable, "-m", module, *arguments]
