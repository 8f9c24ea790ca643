"""The cut of weights into requests: every tensor once, within the limits, aligned, and back again bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.sync.chunks import chunks, flatten, tensor_info, unflatten
from rlx.types.weights import WeightChunk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3)
NAMED = st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=25)


def make(specs: list[tuple[list[int], torch.dtype]]) -> list[tuple[str, torch.Tensor]]:
    return [(f"t{index}", torch.randn(shape).to(dtype)) for index, (shape, dtype) in enumerate(specs)]


@settings(max_examples=150, deadline=None)
@given(NAMED, st.integers(1, 900), st.integers(0, 500))
def test_every_tensor_travels_once_within_the_limits(specs, bucket_bytes, flatten_below_bytes):
    tensors = make(specs)
    cut = list(chunks(iter(tensors), bucket_bytes, flatten_below_bytes))
    arrived = {}
    for chunk in cut:
        assert chunk.infos and chunk.infos == tuple(
            tensor_info(i.name, t) for i, t in zip(chunk.infos, chunk.tensors, strict=True)
        )
        assert chunk.num_bytes <= bucket_bytes or len(chunk.infos) == 1
        assert all((info.num_bytes < flatten_below_bytes) == chunk.flattened for info in chunk.infos)
        received = unflatten(flatten(chunk), chunk.infos) if chunk.flattened else chunk.tensors
        for info, tensor in zip(chunk.infos, received, strict=True):
            assert info.name not in arrived
            arrived[info.name] = tensor
    assert arrived.keys() == dict(tensors).keys()
    for name, tensor in tensors:
        assert arrived[name].dtype == tensor.dtype and torch.equal(arrived[name], tensor)


@settings(max_examples=80, deadline=None)
@given(NAMED, st.integers(1, 900))
def test_flattened_tensors_are_aligned_to_their_width(specs, bucket_bytes):
    for chunk in chunks(make(specs), bucket_bytes, 10**9):
        offset = 0
        for info in chunk.infos:
            assert offset % getattr(torch, info.dtype).itemsize == 0
            offset += info.num_bytes


def test_memory_is_bounded_and_drawing_is_lazy():
    waiting = 0
    largest = 0

    def source():
        nonlocal waiting, largest
        for index in range(60):
            tensor = torch.zeros(50 if index % 3 else 130)
            waiting += tensor.numel() * 4
            largest = max(largest, waiting)
            yield f"t{index}", tensor

    stream = chunks(source(), 1000, 400)
    assert waiting == 0
    total = 0
    for chunk in stream:
        waiting -= chunk.num_bytes
        total += chunk.num_bytes
    assert total == 20 * 130 * 4 + 40 * 50 * 4
    assert largest <= 2 * 1000 + 520


def test_views_are_sent_as_they_look():
    base = torch.randn(6, 5)
    (chunk,) = chunks([("t", base.t()), ("row", base[::2, 1])], 10**6, 10**6)
    back = unflatten(flatten(chunk), chunk.infos)
    assert torch.equal(back[0], base.t()) and torch.equal(back[1], base[::2, 1])


def test_errors():
    tensor = torch.randn(3)
    with pytest.raises(ValueError, match=r"sync\.bucket_bytes"):
        list(chunks([("t", tensor)], 0, 1))
    chunk = WeightChunk(infos=(tensor_info("t", tensor),), tensors=(tensor,), flattened=True)
    with pytest.raises(ValueError, match=r"11 bytes.* need 12"):
        unflatten(flatten(chunk)[:-1], chunk.infos)
