"""Rows cut and merge as Megatron lays its parameters out; every split gives the Hugging Face tensors back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlx.arch.architecture import Architecture
from rlx.arch.layout import layers_per_chunk
from rlx.arch.weights import (
    QKV,
    Gated,
    Row,
    Shard,
    Stacked,
)
from rlx.models.hf.row_tensors import export, load
from rlx.models.pipeline import megatron_layout

ARCH = Architecture(
    model_type="llama",
    hidden_size=6,
    num_layers=1,
    num_heads=8,
    num_kv_heads=2,
    head_dim=3,
    ffn_hidden_size=16,
    vocab_size=11,
    norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=8,
    tied_embeddings=False,
)


def tensors(row: Row) -> dict[str, Tensor]:
    found, first = {}, 0.0
    for name, shape in zip(row.hf_names, row.hf_shapes(ARCH), strict=True):
        count = torch.Size(shape).numel()
        found[name] = torch.arange(first, first + count).reshape(shape)
        first += count
    return found


def slices(row: Row, source: dict[str, Tensor], tp: int) -> list[Tensor]:
    def read(name: str, dim: int, start: int, stop: int) -> Tensor:
        assert 0 <= start <= stop <= source[name].shape[dim]
        return source[name].narrow(dim, start, stop - start)

    return [load(row, read, row.hf_names, Shard(rank=rank, size=tp), ARCH) for rank in range(tp)]


ROWS = [
    QKV("q", "k", "v"),
    QKV("q", "k", "v", bias=True),
    Gated("gate", "up"),
    Gated("gate", "up", bias=True),
    Stacked("qkv", QKV("q", "k", "v")),
    Stacked("gate_up", Gated("gate", "up")),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{type(row).__name__}-{'-'.join(row.hf_names)}")
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_split_gives_the_tensors_back(row: Row, tp: int) -> None:
    source = tensors(row)
    parts = slices(row, source, tp)
    assert len({part.shape for part in parts}) == 1
    for name, tensor in zip(row.hf_names, export(row, parts, ARCH), strict=True):
        assert torch.equal(tensor, source[name])


def test_fewer_key_value_heads_than_ranks_is_megatrons_even_cut() -> None:
    """Megatron gathers the products of all ranks and takes them for the whole fused projection, row by row."""
    row = QKV("q", "k", "v")
    source = tensors(row)
    assert torch.equal(torch.cat(slices(row, source, 4)), slices(row, source, 1)[0])


def test_stacked_reads_what_its_parts_would() -> None:
    row = Stacked("qkv", QKV("q", "k", "v"))
    whole = tensors(row)["qkv"]
    parts = dict(zip("qkv", whole.split([24, 6, 6]), strict=True))
    for tp in (1, 2, 4):
        for found, expected in zip(slices(row, {"qkv": whole}, tp), slices(QKV("q", "k", "v"), parts, tp), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("num_layers", "pp", "vpp", "expected"),
    [
        (8, 4, 1, [2, 2, 2, 2]),
        (5, 2, 1, [3, 2]),
        (95, 4, 1, [24, 24, 24, 23]),
        (5, 4, 1, [1, 2, 1, 1]),
        (7, 4, 1, [2, 2, 2, 1]),
        (5, 2, 2, [1, 2, 1, 1]),
        (1, 1, 1, [1]),
    ],
)
def test_layers_are_dealt_evenly(num_layers: int, pp: int, vpp: int, expected: list[int]) -> None:
    assert layers_per_chunk(num_layers, pp, vpp) == expected
    layout = megatron_layout(num_layers, pp, vpp)
    if num_layers % (pp * vpp) == 0:
        assert layout is None
    else:
        assert layout is not None and [stage.count("decoder") for stage in layout] == expected
        assert layout[0][0] == "embedding" and layout[-1][-1] == "loss"


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 layers do not fill"):
        layers_per_chunk(3, 2, 2)
