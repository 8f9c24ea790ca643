"""Runs a program on N gloo ranks: real processes, real Megatron. The caller's own process stays free of it.

Ranks are forked from one server process that has imported torch and Megatron but started nothing: importing them anew costs
each rank more than most programs do.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ["tests.dist.on_cpu", "rlx.trainer.worker", "rlx.arch.families", "tests.dist.programs.layouts"]


def run_ranks(module: str, world_size: int, arguments: dict[str, Any], out: Path, timeout_s: float = 240) -> None:
    """``python -m module ARGUMENTS_JSON`` on every rank; raises with the ranks' last lines unless all end with 0.

    ``arguments["out"]`` tells the program where to leave its results.
    """
    env = {
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
    ranks: list[BaseProcess] = []
    try:
        for rank, log in enumerate(logs):
            own = os.environ | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(_context().Process(target=_rank, args=(module, text, own, str(log))))
            ranks[-1].start()
        deadline = time.monotonic() + timeout_s
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    tails = "\n".join(f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * world_size, f"exit codes {codes} (None: not done within {timeout_s:g} s)\n{tails}"


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _rank(module: str, text: str, env: dict[str, str], log: str) -> None:
    """In the forked process: become what ``python -m module text`` would be, its output in ``log``."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = [module, text]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
