"""Weights off a broadcast group: a stage's, bucket by bucket.

Requests:

    {"group": G, "bucket": [[name, dtype, shape], ...], "number": N}   one bucket comes; remember it as the group's Nth, the last
    {"group": G, "stream": N}                                          the N that are remembered come again, new weights in them

A bucket is one broadcast of bytes from rank 0, its tensors laid end to end. While a bucket is copied the next one travels; two
are held at once. At the end every rank tells all others how it went, so the trainer knows that the bytes are in place, not merely
on their way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from .buckets import Bucket, Model, addresses_of, entries_of, forget_images, tell_once

ANSWER_BYTES = 1024
_buckets: dict[str, list[Bucket]] = {}


def take(model: Model, request: dict[str, Any]) -> None:
    """Do what the request asks, and answer over the group."""
    name = request["group"]
    try:
        group = _group(name)
        problem = _take(model, group, name, request)
        _answer(group, problem, _device(model, group))
    except RuntimeError as error:  # the trainer or another engine has gone: nobody is left to tell
        print(f"rlx: weight group {name} broke: {error}", file=sys.stderr, flush=True)


def answers(group: dist.ProcessGroup, device: torch.device, problem: str = "") -> list[str]:
    """What each rank of the group says at the end of a request, in rank order; empty: all went well. Collective."""
    said = problem.encode(errors="replace")[: ANSWER_BYTES - 1]
    mine = torch.zeros(ANSWER_BYTES, dtype=torch.uint8)
    mine[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else mine[:0]
    own = mine.to(device)
    every = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(every, own, group=group)
    rows = torch.stack(every).cpu()
    return [bytes(row[row != 0].tolist()).decode(errors="replace") for row in rows]


def _take(model: Model, group: dist.ProcessGroup, name: str, request: dict[str, Any]) -> str:
    """Receive and load; what went wrong. What was announced is received in any case: the trainer sends it."""
    if "bucket" in request:
        known = _buckets.setdefault(name, [])
        del known[request["number"] :]
        known.append(Bucket(entries_of(request["bucket"])))
        todo = known[-1:]
    else:
        todo = _buckets.get(name, [])
        if len(todo) != request["stream"]:
            return f"{request['stream']} buckets were announced, {len(todo)} are known of the group {name}"
        tell_once(name, todo)
    forget_images(todo)
    problem = ""
    addresses: tuple[int, ...] | None = None
    for bucket, received in zip(todo, _received(group, todo, _device(model, group)), strict=True):
        if problem:
            continue
        addresses = addresses or addresses_of(model)  # the first buckets are on their way meanwhile
        try:
            bucket.load(model, received) if "bucket" in request else bucket.fill(model, received, addresses)
        except Exception as error:
            problem = f"{type(error).__name__}: {error} (in {bucket.names})"
    return problem


def _received(group: dist.ProcessGroup, buckets: Sequence[Bucket], device: torch.device) -> Iterator[Tensor]:
    """The bytes of each bucket; the next one is on its way while one is looked at."""

    def begin(bucket: Bucket) -> tuple[Tensor, dist.Work]:
        buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device)
        work = dist.broadcast(buffer, group=group, group_src=0, async_op=True)
        assert work is not None
        return buffer, work

    upcoming = begin(buckets[0]) if buckets else None
    for number in range(len(buckets)):
        assert upcoming is not None
        buffer, work = upcoming
        upcoming = begin(buckets[number + 1]) if number + 1 < len(buckets) else None
        work.wait()
        yield buffer


def _answer(group: dist.ProcessGroup, problem: str, device: torch.device) -> None:
    answers(group, device, problem)
    if problem:
        print(f"rlx: {problem}", file=sys.stderr, flush=True)


def _group(name: str) -> dist.ProcessGroup:
    """The group that the server joined under this name. What is known of groups that are gone is forgotten."""
    groups = {str(known): group for group, known in c10d._world.pg_names.items()}
    for gone in [known for known in _buckets if known not in groups]:
        del _buckets[gone]
    if name not in groups:
        raise RuntimeError(f"this rank has not joined it; it is in {sorted(groups)}")
    group = groups[name]
    assert isinstance(group, dist.ProcessGroup)
    return group


def _device(model: Model, group: dist.ProcessGroup) -> torch.device:
    if dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    device: torch.device = next(iter(model.named_parameters()))[1].device
    return device
