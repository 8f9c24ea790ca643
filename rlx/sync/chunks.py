"""How weights are cut for transport: a stream of named tensors in, a stream of requests out. Pure; no network.

Transport goes by size. A large tensor travels as it is: on NVLink flattening it costs a copy on both sides and buys
nothing. Small ones share one flat byte buffer, since each broadcast has a fixed cost. The receiver cuts that buffer
without padding and views the slices, so wider types come first: every slice then starts at a multiple of its width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from rlx.types.weights import TensorInfo, WeightChunk


def chunks(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, flatten_below_bytes: int) -> Iterator[WeightChunk]:
    """Yield every tensor exactly once, in chunks of at most ``bucket_bytes`` (a larger tensor travels alone).

    Tensors under ``flatten_below_bytes`` go into flattened chunks, and so do those of 8 bits, a type that not every group can
    broadcast; the others into plain ones. Streaming: a tensor is
    drawn only when the chunks before it are out, and less than two buckets plus one tensor wait here at any time.
    """
    if bucket_bytes < 1:
        raise ValueError(f"sync.bucket_bytes must be at least 1, got {bucket_bytes}")
    small = _Bucket(bucket_bytes, flattened=True)
    large = _Bucket(bucket_bytes, flattened=False)
    for name, tensor in tensors:
        bucket = small if tensor.nbytes < flatten_below_bytes or tensor.dtype.itemsize == 1 else large
        if not bucket.fits(tensor):
            yield bucket.take()
        bucket.add(name, tensor)
        if bucket.num_bytes >= bucket_bytes:
            yield bucket.take()
    for bucket in (large, small):
        if bucket.named:
            yield bucket.take()


def tensor_info(name: str, tensor: Tensor) -> TensorInfo:
    """The description that is announced for ``tensor``."""
    return _info(name, tensor.shape, tensor.dtype)


@cache
def _info(name: str, shape: torch.Size, dtype: torch.dtype) -> TensorInfo:
    """One object for each tensor of the model, whose books are then quickly compared."""
    return TensorInfo(name=name, shape=tuple(shape), dtype=str(dtype).removeprefix("torch."))


def flatten(chunk: WeightChunk) -> Tensor:
    """The chunk's tensors laid end to end in their order, without padding: uint8 [chunk.num_bytes]."""
    with torch.no_grad():
        buffer = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in chunk.tensors])
    assert buffer.numel() == chunk.num_bytes, f"flattened {buffer.numel()} bytes, announced {chunk.num_bytes}"
    return buffer


def unflatten(buffer: Tensor, infos: Sequence[TensorInfo]) -> list[Tensor]:
    """Undo ``flatten`` (views of ``buffer``). Raises ValueError when the bytes are not what ``infos`` announce."""
    announced = sum(info.num_bytes for info in infos)
    if buffer.numel() != announced:
        raise ValueError(f"the buffer holds {buffer.numel()} bytes, its tensors need {announced}")
    parts = torch.split(buffer, [info.num_bytes for info in infos])
    return [part.view(getattr(torch, info.dtype)).view(info.shape) for part, info in zip(parts, infos, strict=True)]


class _Bucket:
    """Tensors waiting for their request."""

    def __init__(self, limit_bytes: int, *, flattened: bool) -> None:
        self.limit_bytes = limit_bytes
        self.flattened = flattened
        self.named: list[tuple[str, Tensor]] = []
        self.num_bytes = 0

    def fits(self, tensor: Tensor) -> bool:
        return not self.named or self.num_bytes + tensor.nbytes <= self.limit_bytes

    def add(self, name: str, tensor: Tensor) -> None:
        self.named.append((name, tensor))
        self.num_bytes += tensor.nbytes

    def take(self) -> WeightChunk:
        """Empty the bucket into a chunk."""
        named = sorted(self.named, key=lambda item: -item[1].element_size()) if self.flattened else self.named
        self.named, self.num_bytes = [], 0
        return WeightChunk(
            infos=tuple(tensor_info(name, tensor) for name, tensor in named),
            tensors=tuple(tensor for _, tensor in named),
            flattened=self.flattened,
        )
