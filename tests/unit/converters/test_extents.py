"""Moves of bytes: rows exported, stretches, columns, blocks as torch saves them, and what they say when they fail."""

from __future__ import annotations

import errno
import io
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters import extents
from converters.extents import Columns, Extent, cut, put, put_columns
from converters.items import ItemFile
from converters.plan import exported_rows, parameters
from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import architecture_of
from rlx.arch.weights import Shard
from rlx.models.hf.row_tensors import load

CONFIG: dict[str, Any] = {
    "model_type": "phi3", "hidden_act": "silu", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 37, "rms_norm_eps": 1e-5, "pad_token_id": 0,
}  # fmt: skip


def arch_of(model_type: str) -> Architecture:
    config = CONFIG | {"model_type": model_type}
    return architecture_of(config)


@pytest.fixture
def source(tmp_path: Path) -> tuple[int, bytes]:
    data = os.urandom(3 * 2**20 + 17)
    (tmp_path / "source").write_bytes(data)
    return os.open(tmp_path / "source", os.O_RDONLY), data


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_exported_rows_make_up_the_tensors(model_type: str) -> None:
    arch = arch_of(model_type)
    for parameter in parameters(arch):
        tensors = {name: torch.randn(shape) for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True)}

        def read(name: str, dim: int, start: int, stop: int, tensors: dict[str, Tensor] = tensors) -> Tensor:
            return tensors[name].narrow(dim, start, stop - start)

        whole = load(parameter.row, read, parameter.hf_names, Shard(rank=0, size=1), arch)
        for rows, expected in zip(exported_rows(parameter, arch), tensors.values(), strict=True):
            found = torch.cat([whole[first : first + count] for first, count in rows])
            assert torch.equal(found, expected), parameter.name


def test_cuts() -> None:
    laid = [Extent(7, 100, 10), Extent(8, 0, 5), Extent(7, 500, 20)]
    assert list(cut(laid, 8, 10)) == [Extent(7, 108, 2), Extent(8, 0, 5), Extent(7, 500, 3)]
    assert list(cut(laid, 10, 5)) == [Extent(8, 0, 5)]


@pytest.mark.parametrize("step", [24, 3000, 2**17])
def test_columns_stand_side_by_side(source: tuple[int, bytes], tmp_path: Path, step: int) -> None:
    """Cut out of whole rows, read piece by piece, and in rows larger than a block."""
    descriptor, data = source
    count, (left, right) = len(data) // step - 1, (step // 3, step // 2)
    sides = [Columns(descriptor, 5, left, step, count), Columns(descriptor, 2, right, step, count)]
    target = os.open(tmp_path / "target", os.O_CREAT | os.O_RDWR)
    assert put_columns(sides, target, 7) == count * (left + right)
    rows = [data[row * step + 5 :][:left] + data[row * step + 2 :][:right] for row in range(count)]
    assert (tmp_path / "target").read_bytes() == bytes(7) + b"".join(rows)
    with pytest.raises(ValueError, match="source ended at byte"):
        put_columns([Columns(descriptor, 5, left, step, count + 4)], target, 0)


@pytest.mark.parametrize("way", ["in the kernel", "no kernel copies", "gathered"])
def test_copies(source: tuple[int, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    descriptor, data = source
    if way == "no kernel copies":

        def refuse(*arguments: Any) -> int:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    if way == "gathered":
        monkeypatch.setattr(extents, "MIN_EXTENT_BYTES", 2**40)
    target = os.open(tmp_path / "target", os.O_CREAT | os.O_RDWR)
    assert put([Extent(descriptor, 5, 2 * 2**20 + 3), Extent(descriptor, 0, 9)], target, 11) == 2 * 2**20 + 12
    assert (tmp_path / "target").read_bytes() == bytes(11) + data[5 : 5 + 2 * 2**20 + 3] + data[:9]
    with pytest.raises(ValueError, match=f"source ended at byte {len(data)}"):
        put([Extent(descriptor, len(data) - 10, 11)], target, 0)


def test_a_full_disk_is_not_taken_for_another_way(source: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        put([Extent(source[0], 0, 2**20)], source[0], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_blocks_are_what_torch_saves(source: tuple[int, bytes], tmp_path: Path, dtype: torch.dtype) -> None:
    shape, name = (1, 7, 24), str(dtype).removeprefix("torch.")
    size = 7 * 24 * dtype.itemsize
    value = torch.frombuffer(bytearray(source[1][3 : 3 + size]), dtype=dtype).view(shape)
    file = ItemFile(tmp_path / "items")
    halves = [Extent(source[0], 3, 100), Extent(source[0], 103, size - 100)]
    file.add(("copied", (0, 0, 0), shape), name, partial(put, halves), like=3)
    file.add(("again", (0, 0, 0), shape), name, partial(put, [Extent(source[0], 3, size)]))
    file.close()
    content = (tmp_path / "items").read_bytes()
    assert len(content) == file.items[-1].position + file.items[-1].length
    assert content.index(source[1][3 : 3 + size]) % 4096 == 3, "pages are copied whole"
    saved = io.BytesIO()
    torch.save(value, saved)
    for item in file.items:
        assert item.length == len(saved.getvalue())
        found = torch.load(io.BytesIO(content[item.position : item.position + item.length]), weights_only=True)
        assert found.dtype == dtype and found.shape == shape
        assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))
