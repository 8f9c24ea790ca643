"""Runs a program on N gloo ranks: real processes, real Megatron. The caller's own process stays free of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(module: str, world_size: int, arguments: dict[str, Any], out: Path, timeout_s: float = 240) -> None:
    """``python -m module ARGUMENTS_JSON`` on every rank; raises with the ranks' last lines unless all end with 0.

    ``arguments["out"]`` tells the program where to leave its results.
    """
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    text = json.dumps(arguments | {"out": str(out)})
    logs = [out.with_suffix(f".rank{rank}.log") for rank in range(world_size)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as stream:
            command = [sys.executable, "-m", module, text]
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=timeout_s) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    tails = "\n".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
    assert not any(codes), f"exit codes {codes}\n{tails}"
