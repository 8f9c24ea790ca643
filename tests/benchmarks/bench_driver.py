"""From scored groups to batches in the ranks' memory: `make bench-driver`. Prints bytes a token, what a rank holds, the time
beside one gloo scatter of the same bytes, the driver's time a sample by the number of ranks, and its memory for a large batch.
Fails where one of these misses its bound.

Ranks are processes that join the driver as trainer ranks do; a crowd of ranks is one process that speaks for all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from rlx.data.plan import plan_batch
from rlx.data.samples import RolloutBatch, to_train_batch
from rlx.driver.lane import CommandLane, Listener
from rlx.driver.ranks import parts_of
from rlx.trainer.channel import pack
from rlx.trainer.commands import Command
from rlx.trainer.lane import Answer, DriverAddress, Leave, Order, join_driver, serve, signs_of_life
from rlx.types.layout import BatchPlan, ParallelDims
from rlx.types.rollout import Prompt, Reward, RolloutGroup, Segment, Trajectory
from rlx.types.train_batch import BatchPart

SECRET, GROUP_SIZE, MAX_TOKENS = "of this benchmark", 16, 16_384
MAX_BYTES_A_TOKEN, MAX_RATIO, MAX_HELD, MAX_DRIVER_GIB, MAX_GROWTH = 24, 3.0, 1.5, 8.0, 1.5
FORK = multiprocessing.get_context("fork")


class Holder:
    """A rank that keeps its part, as a worker does."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.part: BatchPart | None = None

    def load_batch(self, part: BatchPart) -> None:
        self.part = part


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory(Command[Holder, int]):
    """Bytes that rank ``who``'s process has of its own."""

    title = "memory"
    who: int

    def run(self, worker: Holder) -> int | None:
        return int(psutil.Process().memory_full_info().uss) if worker.rank == self.who else None


def make_groups(num_samples: int, num_tokens: int) -> list[RolloutGroup]:
    """Scored groups of 16 answers; an eighth of the tokens is the prompt."""
    draw = np.random.default_rng(0)
    num_prompt = num_tokens // 8
    groups = []
    for prompt_id in range(-(-num_samples // GROUP_SIZE)):
        prompt = Segment(token_ids=_packed("i", draw.integers(0, 150_000, num_prompt, np.int32)))
        answers = []
        for _ in range(min(GROUP_SIZE, num_samples - GROUP_SIZE * prompt_id)):
            ids = _packed("i", draw.integers(0, 150_000, num_tokens - num_prompt, np.int32))
            logprobs = _packed("d", -draw.random(num_tokens - num_prompt))
            answer = Segment(token_ids=ids, rollout_logprobs=logprobs, weight_version=3)
            answers.append(Trajectory(segments=(prompt, answer), finish_reason="stop"))
        rewards = tuple(Reward(value=float(index % 2)) for index in range(len(answers)))
        question = Prompt(prompt_id=prompt_id, token_ids=(), text="")
        groups.append(RolloutGroup(prompt=question, trajectories=tuple(answers), rewards=rewards))
    return groups


def _packed(typecode: str, numbers: np.ndarray) -> Any:
    made = array(typecode)
    made.frombytes(numbers.tobytes())
    return made


def hand_out(lane: CommandLane, groups: Sequence[RolloutGroup], dims: ParallelDims) -> tuple[RolloutBatch, BatchPlan]:
    """What the driver does between scored groups and batches in the ranks' memory."""
    advantages = [[reward.value - 0.5 for reward in group.rewards or ()] for group in groups]
    batch, _ = to_train_batch(groups, advantages)
    budget = max(MAX_TOKENS, *batch.lengths)
    plan = plan_batch(batch.lengths, batch.loss_tokens, dims=dims, num_mini_batches=1, max_tokens=budget)
    lane.ask(parts_of(batch, plan, dims))
    return batch, plan


def be_rank(address: DriverAddress, rank: int) -> None:
    channel = join_driver(address, SECRET, rank, 60)
    with signs_of_life(channel):
        serve(channel, Holder(rank))


def be_crowd(address: DriverAddress, num_ranks: int) -> None:
    """All ranks: takes what each is sent, keeps nothing."""
    channels = [join_driver(address, SECRET, rank, 60) for rank in range(num_ranks)]
    for channel in channels:
        channel.send(Answer(number=0))
    while True:
        numbers = []
        for channel in channels:
            order = channel.receive()
            if isinstance(order, Leave):
                return
            numbers.append(order.number)
        for number, channel in zip(numbers, channels, strict=True):
            channel.send(Answer(number=number))


@contextmanager
def ranks_as(target: Callable[..., None], num_ranks: int, each: bool) -> Iterator[CommandLane]:
    """A lane to ranks: a process each, or one for all."""
    listener = Listener("127.0.0.1", SECRET, num_ranks)
    work = [(listener.address, rank) for rank in range(num_ranks)] if each else [(listener.address, num_ranks)]
    processes = [FORK.Process(target=target, args=arguments) for arguments in work]
    for process in processes:
        process.start()
    lane = CommandLane(listener.wait(120), silence_s=600)
    listener.close()
    yield lane
    lane.leave(done=True)
    for process in processes:
        process.join(60)


@dataclass(frozen=True)
class Measured:
    """Of handing out one batch: seconds, bytes on the wire, and the most that a rank came to hold over its share."""

    seconds: float
    num_bytes: int
    held: float


def measure_ranks(groups: Sequence[RolloutGroup], num_ranks: int, repeats: int) -> Measured:
    dims, times = ParallelDims(world_size=num_ranks), []
    with ranks_as(be_rank, num_ranks, each=True) as lane:
        before = [lane.ask(Memory(who=rank)) for rank in range(num_ranks)]
        for _ in range(repeats):
            began = time.perf_counter()
            batch, plan = hand_out(lane, groups, dims)
            times.append(time.perf_counter() - began)
        after = [lane.ask(Memory(who=rank)) for rank in range(num_ranks)]
    make = parts_of(batch, plan, dims).make
    sizes = [sum(view.nbytes for view in pack(Order(number=1, step=1, command=make(rank)))) for rank in range(num_ranks)]
    held = max((now - was) / size for was, now, size in zip(before, after, sizes, strict=True))
    return Measured(seconds=statistics.median(times), num_bytes=sum(sizes), held=held)


def scatter_s(num_bytes: int, num_ranks: int, repeats: int) -> float:
    """Median seconds of one gloo scatter of so many bytes to so many ranks, from a rank of its own."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = FORK.SimpleQueue()
        meeting = f"file://{Path(folder) / 'store'}"
        arguments = [(meeting, rank, num_ranks + 1, num_bytes // num_ranks, repeats, outcome) for rank in range(num_ranks + 1)]
        processes = [FORK.Process(target=_scatter, args=each) for each in arguments]
        for process in processes:
            process.start()
        times: list[float] = outcome.get()
        for process in processes:
            process.join(60)
    return statistics.median(times)


def _scatter(*arguments: Any) -> None:
    meeting, rank, world_size, size, repeats, outcome = arguments
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    mine = torch.empty(size, dtype=torch.uint8)
    parts = [torch.full((size,), number % 256, dtype=torch.uint8) for number in range(world_size)] if rank == 0 else None
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        dist.scatter(mine, parts)
        dist.barrier()
        times.append(time.perf_counter() - began)
    if rank == 0:
        outcome.put(times[1:])
    dist.destroy_process_group()


def driver_gib(num_samples: int, num_tokens: int, num_ranks: int) -> float:
    """The most memory that a driver ever has which holds the groups and hands them out."""
    outcome = FORK.SimpleQueue()

    def be_driver() -> None:
        with ranks_as(be_crowd, num_ranks, each=False) as lane:
            hand_out(lane, make_groups(num_samples, num_tokens), ParallelDims(world_size=num_ranks))
        status = Path("/proc/self/status").read_text()
        outcome.put(int(status.split("VmHWM:")[1].split()[0]) / 2**20)

    process = FORK.Process(target=be_driver)
    process.start()
    found: float = outcome.get()
    process.join(60)
    return found


def cpu_us_a_sample(groups: Sequence[RolloutGroup], num_ranks: int, repeats: int) -> float:
    """The driver's own processor time, kernel counted."""
    times = []
    with ranks_as(be_crowd, num_ranks, each=False) as lane:
        for _ in range(repeats):
            began = time.process_time()
            batch, _ = hand_out(lane, groups, ParallelDims(world_size=num_ranks))
            times.append(1e6 * (time.process_time() - began) / len(batch))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2_048)
    parser.add_argument("--tokens", type=int, default=3_712)
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--large", type=int, nargs=2, default=(16_384, 8_192), metavar=("SAMPLES", "TOKENS"))
    parser.add_argument("--crowds", type=int, nargs="+", default=(1, 8, 64, 512))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-show", action="store_true", help="hold nothing against the bounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    groups, num_tokens = make_groups(args.samples, args.tokens), args.samples * args.tokens
    found = measure_ranks(groups, args.ranks, args.repeats)
    beside_s = scatter_s(found.num_bytes, args.ranks, args.repeats)
    ratio, bytes_a_token = found.seconds / beside_s, found.num_bytes / num_tokens
    print(
        f"{args.samples:,} samples of {args.tokens:,} tokens to {args.ranks} data-parallel ranks: {found.num_bytes / 1e6:.1f} MB,"
        f" {bytes_a_token:.1f} bytes a token over all ranks; a rank holds {found.held:.2f} x its share\n"
        f"  groups to ranks' memory {1e3 * found.seconds:.0f} ms, a gloo scatter of the same bytes {1e3 * beside_s:.0f} ms:"
        f" {ratio:.2f} x",
        flush=True,
    )
    costs = {num_ranks: cpu_us_a_sample(groups, num_ranks, args.repeats) for num_ranks in args.crowds}
    growth = max(costs.values()) / costs[args.crowds[0]]
    shown = ", ".join(f"{num_ranks} ranks {cost:.0f}" for num_ranks, cost in costs.items())
    print(f"driver's processor time a sample in us: {shown}; {growth:.2f} x at most", flush=True)
    del groups
    gib = driver_gib(args.large[0], args.large[1], args.ranks)
    tokens = args.large[0] * args.large[1]
    print(
        f"{args.large[0]:,} x {args.large[1]:,} tokens ({tokens / 1e6:.0f} M), groups counted: {gib:.1f} GiB on the driver",
        flush=True,
    )
    if args.only_show:
        return
    assert bytes_a_token <= MAX_BYTES_A_TOKEN, f"{bytes_a_token:.1f} bytes a token, expected at most {MAX_BYTES_A_TOKEN}"
    assert found.held <= MAX_HELD, f"a rank holds {found.held:.2f} x its share, expected at most {MAX_HELD}"
    assert ratio <= MAX_RATIO, f"{ratio:.2f} x a scatter, expected at most {MAX_RATIO}"
    assert gib <= MAX_DRIVER_GIB, f"{gib:.1f} GiB on the driver, expected at most {MAX_DRIVER_GIB}"
    assert growth <= MAX_GROWTH, f"{growth:.2f} x the time a sample of {args.crowds[0]} ranks, expected at most {MAX_GROWTH}"


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
