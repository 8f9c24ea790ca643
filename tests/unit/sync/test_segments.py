"""Shared memory of one's own: readers open it by torch's names, and nothing of it outlives who made it."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from rlx.rollout.sglang.segments import SHARED_MEMORY, Segments, own_segments
from rlx.rollout.sglang.shared_tensors import in_shared_memory, share_bucket
from rlx.sync.chunks import tensor_info

# Reads texts, line by line; says the sum of each and lets go of it on the next line.
READER = """
import sys
from rlx.rollout.sglang.shared_tensors import open_bucket
for line in sys.stdin:
    if line.strip():
        tensor, _ = open_bucket(line.strip())
        print(sum(tensor.tolist()), flush=True)
    else:
        del tensor
        print("gone", flush=True)
"""
SENDER = """
import sys, torch
from rlx.rollout.sglang.segments import own_segments
from rlx.rollout.sglang.shared_tensors import share_bucket
from rlx.sync.chunks import tensor_info
tensor = torch.arange(100, dtype=torch.uint8)
print(share_bucket(tensor, [tensor_info("a", tensor)]), own_segments().prefix, own_segments().keeper.pid, flush=True)
sys.stdin.read()
"""
Start = Callable[[str], "Process"]


class Process:
    """A Python program that one talks to in lines."""

    def __init__(self, program: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self, said: str | None = None) -> str:
        assert self.child.stdin is not None and self.child.stdout is not None and self.child.stderr is not None
        if said is not None:
            self.child.stdin.write(said + "\n")
            self.child.stdin.flush()
        return self.child.stdout.readline().strip() or self.child.stderr.read()


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Start:
    def started(program: str) -> Process:
        process = Process(program)
        request.addfinalizer(process.child.wait)
        request.addfinalizer(process.child.kill)
        return process

    return started


def left(prefix: Path) -> list[str]:
    return sorted(file.name for file in prefix.parent.glob(f"{prefix.name}-*"))


def test_readers_open_it_by_name_and_the_last_one_removes_it(start: Start) -> None:
    prefix = own_segments().prefix
    before = left(prefix)
    tensor = torch.arange(200, dtype=torch.uint8)
    shared = in_shared_memory(tensor)
    assert torch.equal(shared, tensor) and in_shared_memory(shared) is shared
    texts = [share_bucket(shared, [tensor_info("a", tensor)]) for _ in range(2)]
    (segment,) = set(left(prefix)) - set(before)
    readers = [start(READER), start(READER)]
    assert [reader.line(text) for reader, text in zip(readers, texts, strict=True)] == ["19900", "19900"]
    del shared
    gc.collect()
    assert readers[0].line("") == "gone" and segment in left(prefix)
    assert readers[1].line("") == "gone" and segment not in left(prefix)
    names = {child.name() for child in psutil.Process().children(recursive=True)}
    assert not [name for name in names if "torch_shm" in name]


@pytest.mark.parametrize("how", ["kill", "terminate", "end"])
def test_nothing_outlives_the_sender(start: Start, how: str) -> None:
    """A reader that has it open keeps it, and is none the worse for closing it."""
    sender, reader = start(SENDER), start(READER)
    text, prefix, keeper = sender.line().split()
    assert reader.line(text) == "4950" and len(left(Path(prefix))) == 2
    if how == "end":
        sender.child.communicate()
    else:
        getattr(sender.child, how)()
        sender.child.wait()
    process = psutil.Process(int(keeper))
    _until(lambda: not left(Path(prefix)))
    assert reader.line("") == "gone"
    reader.child.communicate()
    assert reader.child.returncode == 0
    _until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def test_what_there_is_no_room_for_is_an_error(start: Start) -> None:
    segments = Segments()
    with pytest.raises(OSError):
        segments.holding(torch.zeros(1, dtype=torch.uint8).expand(2**50))
    assert left(segments.prefix) == [f"{segments.prefix.name}-manager"] and segments.prefix.parent == SHARED_MEMORY


def _until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
