"""Runs inside an engine: takes a stage's weights off a broadcast group, bucket by bucket, at the speed of the wire.

SGLang loads this file by ``--custom-weight-loader rlx_receiver.load`` and calls ``load`` for requests to
``/update_weights_from_tensor`` that name it; it knows torch and nothing else, since servers may live in another environment
than rlx. The tensor in such a request is empty, its name a text (JSON):

    {"group": G, "bucket": [[name, dtype, shape], ...], "number": N}   one bucket comes; remember it as the group's Nth, the last
    {"group": G, "stream": N}                                          the N that are remembered come again, new weights in them

A bucket is one broadcast of bytes from rank 0, its tensors laid end to end. The first time the model's own ``load_weights`` puts
them in place, watched: where it does nothing but copy stretches of the bucket into parameters, those copies are remembered and
repeated later, without the tens of microseconds that it takes for each tensor. Where it does anything else (a conversion, a
derived tensor) it is called each time. While a bucket is copied the next one travels; two are held at once.

At the end every rank tells all others how it went, so the trainer knows that the bytes are in place, not merely on their way.
Nothing is raised: an exception would end the server, and the trainer hears of it in that answer.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode

ANSWER_BYTES = 1024
# In the name of every tensor of a tower. A frozen one comes once, and what it made of images stays right.
_TOWER = "visual."


class Model(Protocol):
    """What an engine's model has: SGLang's and the embedded engine's."""

    def named_parameters(self) -> Any: ...

    def named_buffers(self) -> Any: ...

    def load_weights(self, weights: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a bucket, from byte ``start``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, bucket: Tensor) -> Tensor:
        return _typed(bucket, self.start, self.num_bytes, self.dtype).view(self.shape)


@dataclass(slots=True)
class Copy:
    """Elements of a bucket (from byte ``start``, ``shape`` and ``stride``) that go to ``target``, a view of a parameter."""

    target: Tensor
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_stretch(self) -> bool:
        """Whether it moves bytes from one place to another and nothing more."""
        contiguous = _contiguous_stride(self.shape) == self.stride or math.prod(self.shape) <= 1
        return contiguous and self.target.is_contiguous() and self.target.dtype == self.dtype

    def continues(self, before: Copy) -> bool:
        """Whether both are one stretch, in the bucket and in the parameter."""
        if not (self.is_stretch and before.is_stretch and self.dtype == before.dtype):
            return False
        if self.start != before.start + before.num_bytes or before.target.data_ptr() + before.num_bytes != self.target.data_ptr():
            return False
        return self.target.untyped_storage().data_ptr() == before.target.untyped_storage().data_ptr()

    def joined(self, after: Copy) -> Copy:
        length = self.num_bytes // self.dtype.itemsize + math.prod(after.shape)
        return Copy(self.target.as_strided((length,), (1,)), self.start, self.dtype, (length,), (1,))

    def run(self, bucket: Tensor) -> None:
        reach = 1 + sum((extent - 1) * step for extent, step in zip(self.shape, self.stride, strict=True))
        source = _typed(bucket, self.start, reach * self.dtype.itemsize, self.dtype)
        self.target.copy_(source.as_strided(self.shape, self.stride), non_blocking=True)


@dataclass(slots=True)
class Bucket:
    """What is known of one bucket of a group. ``copies`` None: ``load_weights`` must be called."""

    entries: tuple[Entry, ...]
    copies: list[Copy] | None = None
    addresses: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    def load(self, model: Model, bucket: Tensor) -> None:
        """By the model's own loader, watched."""
        watch = _Watch(bucket, _storages(model))
        with watch:
            model.load_weights(self._named(bucket))
        self.copies = watch.copies if watch.is_plain else None
        self.addresses = _addresses(model)

    def fill(self, model: Model, bucket: Tensor, addresses: tuple[int, ...]) -> None:
        """Copy as before; by the loader where that is not enough or the parameters have moved."""
        if self.copies is None or addresses != self.addresses:
            self.load(model, bucket)
            return
        for copy in self.copies:
            copy.run(bucket)

    def _named(self, bucket: Tensor) -> Iterator[tuple[str, Tensor]]:
        return iter([(entry.name, entry.of(bucket)) for entry in self.entries])


_buckets: dict[str, list[Bucket]] = {}
_told: set[str] = set()


def load(model: Model, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Do what the request asks. ``named_tensors`` is one pair: the request and an empty tensor."""
    request = json.loads(named_tensors[0][0])
    name = request["group"]
    try:
        group = _group(name)
        with torch.no_grad():
            problem = _take(model, group, name, request)
            _answer(group, problem, _device(model, group))
    except RuntimeError as error:  # the trainer or another engine has gone: nobody is left to tell
        print(f"rlx: weight group {name} broke: {error}", file=sys.stderr, flush=True)


def forget_images() -> None:
    """Drop what the tower made of images: SGLang keeps it by the images' content, through updates and flushes."""
    for module in ("sglang.srt.managers.mm_schedule", "sglang.srt.managers.mm_utils"):  # it has moved from the one to the other
        cache = getattr(sys.modules.get(module), "embedding_cache", None)
        if cache is not None:
            cache.clear()


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
        known.append(Bucket(_entries(request["bucket"])))
        todo = known[-1:]
    else:
        todo = _buckets.get(name, [])
        if len(todo) != request["stream"]:
            return f"{request['stream']} buckets were announced, {len(todo)} are known of the group {name}"
        _tell_once(name, todo)
    if any(_TOWER in entry.name for bucket in todo for entry in bucket.entries):
        forget_images()
    problem = ""
    addresses: tuple[int, ...] | None = None
    for bucket, received in zip(todo, _received(group, todo, _device(model, group)), strict=True):
        if problem:
            continue
        addresses = addresses or _addresses(model)  # the first buckets are on their way meanwhile
        try:
            bucket.load(model, received) if "bucket" in request else bucket.fill(model, received, addresses)
        except Exception as error:
            problem = f"{type(error).__name__}: {error} (in {bucket.entries[0].name} to {bucket.entries[-1].name})"
    return problem


def _tell_once(name: str, buckets: Sequence[Bucket]) -> None:
    """One line in the server's log: how publications go from now on."""
    if name in _told:
        return
    _told.add(name)
    copied = [bucket for bucket in buckets if bucket.copies is not None]
    num_copies = sum(len(bucket.copies or ()) for bucket in copied)
    line = f"rlx: {name}: {len(copied)} of {len(buckets)} buckets are copied in {num_copies} stretches"
    others = [bucket.entries[0].name for bucket in buckets if bucket.copies is None]
    line += f"; load_weights is called for those that begin with {', '.join(others[:4])}" if others else ""
    print(line, file=sys.stderr, flush=True)


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


def _entries(rows: Sequence[Sequence[Any]]) -> tuple[Entry, ...]:
    found, start = [], 0
    for name, dtype, shape in rows:
        found.append(Entry(name, getattr(torch, dtype), tuple(shape), start))
        start += found[-1].num_bytes
    return tuple(found)


def _tensors(model: Model) -> Iterator[Tensor]:
    for _, tensor in model.named_parameters():
        yield tensor
    for _, tensor in model.named_buffers():
        yield tensor


def _addresses(model: Model) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in _tensors(model))


def _storages(model: Model) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(model) if tensor.numel()}


def _typed(bucket: Tensor, start: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
    piece = bucket[start : start + num_bytes]
    # A slice that starts at an odd place cannot be read as a wider type in place.
    return (piece if start % dtype.itemsize == 0 else piece.clone()).view(dtype)


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    steps, step = [], 1
    for extent in reversed(shape):
        steps.append(step)
        step *= extent
    return tuple(reversed(steps))


class _Watch(TorchDispatchMode):
    """Notes every copy from the bucket into the model, and whether anything else happened to either of them."""

    def __init__(self, bucket: Tensor, storages: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bucket = bucket.untyped_storage().data_ptr()
        self._base = bucket.data_ptr()
        self._storages = storages
        self.copies: list[Copy] = []
        self.is_plain = True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and self._is_model(args[0]) and self._is_bucket(args[1]):
            self._note(args[0], args[1])
        elif func in _CONSTANTS and not any(isinstance(argument, Tensor) for argument in args[1:]):
            # Padding: the same each time, so it is there already, unless it covers what was copied.
            self.is_plain &= not (self._is_model(args[0]) and any(_overlap(args[0], copy.target) for copy in self.copies))
        elif not _only_looks(func) and any(self._is_model(a) or self._is_bucket(a) for a in _flat((args, kwargs))):
            self.is_plain = False
        return func(*args, **(kwargs or {}))

    def _note(self, target: Tensor, source: Tensor) -> None:
        copy = Copy(target, source.data_ptr() - self._base, source.dtype, tuple(source.shape), tuple(source.stride()))
        self.is_plain &= target.shape == source.shape and source.numel() > 0
        if self.copies and copy.continues(self.copies[-1]):
            self.copies[-1] = self.copies[-1].joined(copy)
        else:
            self.copies.append(copy)

    def _is_model(self, value: Any) -> bool:
        return _storage(value) in self._storages

    def _is_bucket(self, value: Any) -> bool:
        return _storage(value) == self._bucket


_CONSTANTS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


def _storage(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
        return None
    return value.untyped_storage().data_ptr()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether the stretches from first to last element share a byte."""
    (first, last), (start, end) = ((tensor.data_ptr(), tensor.data_ptr() + _reach(tensor)) for tensor in (one, other))
    return first < end and start < last


def _reach(tensor: Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((extent - 1) * step for extent, step in steps)) * tensor.element_size()


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _flat(each)
    elif isinstance(value, dict):
        yield from _flat(tuple(value.values()))
    else:
        yield value


def _only_looks(func: Callable[..., Any]) -> bool:
    """Whether an operation gives a view (of whatever it is given) and changes and reads no element."""
    schema = func._schema  # type: ignore[attr-defined]
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)
