"""Buckets of weights, and how they get into an engine's model.

The first time the model's own loader puts them in place, watched: where it does nothing but copy stretches of the bucket into
parameters, those copies are remembered and repeated later, without the tens of microseconds that it takes for each tensor. Where
it does anything else (a conversion, a derived tensor) it is called each time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# In the name of every tensor of a tower. A frozen one comes once, and what it made of images stays right.
_TOWER = "visual."
_told: set[str] = set()


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
        last = self.entries[-1]
        return last.start + last.num_bytes

    @property
    def names(self) -> str:
        return f"{self.entries[0].name} to {self.entries[-1].name}"

    def load(self, model: Model, bucket: Tensor) -> None:
        """By the model's own loader, watched."""
        watch = _Watch(bucket, storages_of(model))
        with watch:
            model.load_weights(self._named(bucket))
        self.copies = watch.copies if watch.is_plain else None
        self.addresses = addresses_of(model)

    def fill(self, model: Model, bucket: Tensor, addresses: tuple[int, ...]) -> None:
        """Copy as before; by the loader where that is not enough or the parameters have moved."""
        if self.copies is None or addresses != self.addresses:
            self.load(model, bucket)
            return
        for copy in self.copies:
            copy.run(bucket)

    def _named(self, bucket: Tensor) -> Iterator[tuple[str, Tensor]]:
        return iter([(entry.name, entry.of(bucket)) for entry in self.entries])


def forget_images(buckets: Sequence[Bucket]) -> None:
    """Where a tower comes, drop what it made of images: SGLang keeps that by the images' content, through updates and flushes."""
    if not any(_TOWER in entry.name for bucket in buckets for entry in bucket.entries):
        return
    for module in ("sglang.srt.managers.mm_schedule", "sglang.srt.managers.mm_utils"):  # it has moved from the one to the other
        cache = getattr(sys.modules.get(module), "embedding_cache", None)
        if cache is not None:
            cache.clear()


def tell_once(name: str, buckets: Sequence[Bucket]) -> None:
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


def entries_of(rows: Sequence[Sequence[Any]]) -> tuple[Entry, ...]:
    """Of rows (name, dtype, shape): laid end to end; a fourth value says where a tensor starts instead."""
    found: list[Entry] = []
    end = 0
    for name, dtype, shape, *start in rows:
        found.append(Entry(name, getattr(torch, dtype), tuple(shape), start[0] if start else end))
        end = found[-1].start + found[-1].num_bytes
    return tuple(found)


def _tensors(model: Model) -> Iterator[Tensor]:
    for _, tensor in model.named_parameters():
        yield tensor
    for _, tensor in model.named_buffers():
        yield tensor


def addresses_of(model: Model) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in _tensors(model))


def storages_of(model: Model) -> set[int]:
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
        self.storages_of = storages
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
        return _storage(value) in self.storages_of

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
