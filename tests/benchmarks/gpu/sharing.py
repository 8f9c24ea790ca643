"""What a co-located run needs of one GPU, tried in seconds: CUDA IPC between processes, memory that moves to the host and back,
and torch_memory_saver's library in front of an engine. Prints a line each; exit status 1 when one of them fails.

python -m tests.benchmarks.gpu.sharing [INTERPRETER_OF_THE_ENGINES]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from rlx.parallel.memory import _Shelf
from rlx.rollout.sglang.server import cuda_runtime_folders
from rlx.rollout.sglang.shared_tensors import share_bucket
from rlx.sync.chunks import chunks, flatten

READER = """
import sys, torch
from rlx.rollout.sglang.shared_tensors import open_bucket
from rlx.sync.chunks import unflatten
buffer, infos = open_bucket(sys.stdin.read())
assert buffer.is_cuda
print([round(float(t.double().sum()), 3) for t in unflatten(buffer, infos)], flush=True)
"""
SAVER = """
import torch, torch_memory_saver
saver = torch_memory_saver.torch_memory_saver
with saver.region(tag="kv_cache"):
    held = torch.full((2**28,), 7, dtype=torch.uint8, device="cuda")
used = lambda: -torch.cuda.mem_get_info()[0]
full = used()
saver.pause("kv_cache")
freed = full - used()
saver.resume("kv_cache")
held.fill_(3)
torch.cuda.synchronize()
print(f"freed {freed / 2**20:.0f} MiB of 256")
assert freed > 200 * 2**20
"""
FIND = "from torch_memory_saver.utils import get_binary_path_from_package as f; print(f('torch_memory_saver_hook_mode_preload'))"


def ipc() -> str:
    """Another process sees the same GPU, even under another number, and reads what is there."""
    tensors = [("a", torch.randn(1000, 999, device="cuda")), ("b", torch.randn(77, device="cuda").bfloat16())]
    [chunk] = chunks(tensors, 2**40, 2**40)
    wanted = [round(float(tensor.double().sum()), 3) for tensor in chunk.tensors]
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        buffer = flatten(chunk)
        torch.cuda.synchronize()
        command = [sys.executable, "-c", READER]
        found = subprocess.run(command, input=share_bucket(buffer, chunk.infos), text=True, capture_output=True, timeout=90)
        assert found.returncode == 0, found.stderr[-2000:]
        assert found.stdout.strip() == str(wanted), (found.stdout, wanted)
        del buffer
        torch.cuda.ipc_collect()
    left = torch.cuda.memory_allocated() - before
    assert left == 0, f"{left} bytes were not given back"
    return "the reader saw the same numbers, and the memory came back"


def moving() -> str:
    """A storage on the host frees its GPU memory, and its views are what they were afterwards."""
    base = torch.randn(2**26, device="cuda")
    view, wanted = base[100:200], base[100:200].clone()
    shelf, used = _Shelf(keeps=True), torch.cuda.memory_allocated()
    began = time.perf_counter()
    shelf.put_away([view, base])
    away = used - torch.cuda.memory_allocated()
    shelf.bring_back()
    seconds = time.perf_counter() - began
    assert away >= 2**28 and torch.equal(view, wanted), away
    shelf.put_away([view])
    shelf.bring_back()
    return f"256 MiB there and back in {seconds:.3f} s the first time"


def saver() -> str:
    """torch_memory_saver's library loads in front of the engines' interpreter and frees memory."""
    python = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    path = subprocess.run([python, "-c", FIND], text=True, capture_output=True, timeout=90)
    assert path.returncode == 0, path.stderr[-2000:]
    folders = os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), *cuda_runtime_folders(python)]))
    env = os.environ | {"LD_PRELOAD": path.stdout.strip().splitlines()[-1], "LD_LIBRARY_PATH": folders}
    found = subprocess.run([python, "-c", SAVER], text=True, capture_output=True, timeout=90, env=env)
    assert found.returncode == 0, f"exit status {found.returncode}: {found.stderr[-2000:]}"
    return found.stdout.strip().splitlines()[-1]


def main() -> int:
    failed = 0
    parts: dict[str, Callable[[], str]] = {"CUDA IPC": ipc, "moving storages": moving, "torch_memory_saver": saver}
    for name, part in parts.items():
        try:
            print(f"ok      {name}: {part()}", flush=True)
        except Exception as error:
            failed = 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
