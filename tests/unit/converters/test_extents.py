"""Moves in the kernel: row numbers against tensors, stretches, copies and what they say when they fail; Megatron's process."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters import books
from converters.extents import Extent, RowNumbers, copy, cut, stretches
from converters.items import ItemFile
from converters.places import disagreements, places
from converters.plan import parameters
from rlx.models.architecture import Architecture
from rlx.models.families import family_of
from rlx.models.weights import Shard, Vocab

CONFIG: dict[str, Any] = {
    "model_type": "phi3", "hidden_act": "silu", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 37, "rms_norm_eps": 1e-5, "pad_token_id": 0,
}  # fmt: skip


def arch_of(model_type: str) -> Architecture:
    config = CONFIG | {"model_type": model_type}
    return family_of(config).architecture(config)


@pytest.fixture
def source(tmp_path: Path) -> tuple[int, bytes]:
    data = os.urandom(3 * 2**20 + 17)
    (tmp_path / "source").write_bytes(data)
    return os.open(tmp_path / "source", os.O_RDONLY), data


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("size", [1, 2])
def test_row_numbers_do_what_the_rows_do(model_type: str, size: int) -> None:
    arch = arch_of(model_type)
    numbers = RowNumbers(arch)
    for parameter in parameters(arch):
        tensors = {name: torch.randn(shape) for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True)}

        def read(name: str, dim: int, start: int, stop: int, tensors: dict[str, Tensor] = tensors) -> Tensor:
            return tensors[name].narrow(dim, start, stop - start)

        numbered = torch.cat([torch.cat([t, torch.full_like(t[:1], torch.nan)]) for t in tensors.values()])
        is_padded = isinstance(parameter.row, Vocab)
        for rank in range(size):
            shard = Shard(rank=rank, size=size)
            value = parameter.row.load(read, parameter.hf_names, shard, arch)
            rows = numbers.loaded(parameter, shard)
            if rows is None:
                assert size == 2 and parameter.name.endswith(("linear_proj.weight", "linear_fc2.weight"))
                continue
            real = len(value) - (1 if is_padded and rank else 0)
            assert torch.equal(numbered[rows.reshape(-1)][:real], value[:real]), parameter.name
        whole = parameter.row.load(read, parameter.hf_names, Shard(rank=0, size=1), arch)
        for found, expected in zip(numbers.exported(parameter, len(whole)), tensors.values(), strict=True):
            assert torch.equal(whole[found.reshape(-1)], expected), parameter.name


def test_stretches_and_cuts() -> None:
    assert list(stretches(torch.tensor([[4], [5], [6], [0], [2], [3]]))) == [(4, 3), (0, 1), (2, 2)]
    laid = [Extent(7, 100, 10), Extent(8, 0, 5), Extent(7, 500, 20)]
    assert list(cut(laid, 8, 10)) == [Extent(7, 108, 2), Extent(8, 0, 5), Extent(7, 500, 3)]
    assert list(cut(laid, 10, 5)) == [Extent(8, 0, 5)]


@pytest.mark.parametrize("in_kernel", [True, False])
def test_copies(source: tuple[int, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    descriptor, data = source
    if not in_kernel:

        def refuse(*arguments: Any) -> int:
            raise OSError(errno.EXDEV, "another file system")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    target = os.open(tmp_path / "target", os.O_CREAT | os.O_RDWR)
    extents = [Extent(descriptor, 5, 2 * 2**20 + 3), Extent(descriptor, 0, 9)]
    assert copy(extents, target, 11) == 2 * 2**20 + 12
    assert (tmp_path / "target").read_bytes() == bytes(11) + data[5 : 5 + 2 * 2**20 + 3] + data[:9]
    with pytest.raises(ValueError, match=f"source ended at byte {len(data)}"):
        copy([Extent(descriptor, len(data) - 10, 11)], target, 0)


def test_a_full_disk_is_not_taken_for_another_way(source: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        copy([Extent(source[0], 0, 10)], source[0], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_copied_items_are_what_torch_saves(source: tuple[int, bytes], tmp_path: Path, dtype: torch.dtype) -> None:
    like = torch.empty((1, 7, 24), dtype=dtype)
    value = torch.frombuffer(bytearray(source[1][3 : 3 + like.nbytes]), dtype=dtype).view(like.shape)
    file = ItemFile(tmp_path / "items")
    file.add("plain", (0, 0, 0), value)
    file.add_copy("copied", (0, 0, 0), like, [Extent(source[0], 3, 100), Extent(source[0], 103, like.nbytes - 100)])
    file.add("after", (0, 0, 0), value)
    file.close()
    content = (tmp_path / "items").read_bytes()
    assert [item.key for item in file.items] == ["plain", "copied", "after"] and len({item.length for item in file.items}) == 1
    for item in file.items:
        (tmp_path / "one").write_bytes(content[item.position : item.position + item.length])
        found = torch.load(tmp_path / "one", weights_only=True)
        assert (
            found.dtype == dtype and torch.equal(found.view(torch.uint8), value.view(torch.uint8)) and found.shape == like.shape
        )


def test_disagreements_are_named() -> None:
    ours = places(arch_of("llama"))
    theirs = {names: pieces for names, pieces in ours.items() if "model.norm.weight" not in names}
    assert list(disagreements(ours, ours)) == []
    (line,) = disagreements(ours, theirs)
    assert line.startswith("model.norm.weight: ") and "decoder.final_layernorm.weight" in line and "Megatron says nothing" in line


def test_megatrons_process_says_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "without_compiler", lambda: os._exit(3))
    with pytest.raises(RuntimeError, match="status 3"), books.Books(arch_of("llama")) as kept:
        kept.check({})

    def broken() -> None:
        raise KeyError("nothing of that name")

    monkeypatch.setattr(books, "without_compiler", broken)
    with pytest.raises(RuntimeError, match="nothing of that name"), books.Books(arch_of("llama")) as kept:
        kept.check({})
