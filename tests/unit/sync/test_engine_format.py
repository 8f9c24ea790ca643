"""What engines want of a model's weights, and the numbers that they get."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlx.arch.engine_format import BLOCK, EngineFormat, engine_format, fp8_problems, scale_shape
from rlx.arch.families.registry import FAMILIES, architecture_of, read_architecture
from rlx.sync import engine_tensors
from rlx.sync.engine_tensors import FP8, EngineTensors, dequantize, quantize

ARCHITECTURES = Path(__file__).resolve().parents[3] / "configs" / "architectures"
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}
MOE = {
    **QWEN,
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "mlp_only_layers": [1],
}
SIZES = [(128, 128), (1, 1), (127, 129), (256, 384), (300, 5), (3, 300)]


def by_block(matrix: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    for row in range(-(-matrix.shape[0] // BLOCK)):
        for column in range(-(-matrix.shape[1] // BLOCK)):
            yield row, column, matrix[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]


def nearest(value: float, numbers: Tensor) -> float:
    return float((numbers - value).abs().min())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_and_scales_are_those_of_the_formula(size: tuple[int, int], dtype: torch.dtype, monkeypatch) -> None:
    """In float64: a scale is the block's largest magnitude / 448, and no number of the type is nearer to weight / scale."""
    monkeypatch.setattr(engine_tensors, "_STRETCH", 128 * 256)  # in more than one go where there are more rows
    weight = (torch.randn(size) * 10 ** random.uniform(-6, 3)).to(dtype)
    weight[: size[0] // 2] *= 1e-3
    blocks, scales = quantize(weight)
    assert blocks.dtype == FP8 and blocks.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == scale_shape(size)
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    numbers = numbers[~numbers.isnan()]
    for row, column, part in by_block(weight.double()):
        scale = float(part.abs().max()) / 448
        assert float(scales[row, column]) == float(torch.tensor(scale, dtype=torch.float32))
        got = list(by_block(blocks.double()))[row * scales.shape[1] + column][2]
        assert float(got.abs().max()) == 448
        for place in random.sample(range(part.numel()), min(50, part.numel())):
            exact = float(Fraction(float(part.flatten()[place])) / Fraction(float(scales[row, column])))
            off = abs(float(got.flatten()[place]) - exact)
            # Where two are as near, rounding of the quotient to fp32 decides.
            assert off <= nearest(exact, numbers) + abs(exact) * 2**-23


def test_the_product_is_within_half_a_step(monkeypatch) -> None:
    monkeypatch.setattr(engine_tensors, "_STRETCH", 128 * 130)
    weight = torch.randn(300, 260)
    blocks, scales = quantize(weight)
    found = dequantize(blocks, scales, torch.float32)
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:300, :260]
    assert torch.equal(found, blocks.float() * spread)
    # Three bits of fraction: half of 1/8 of the power of two below; the smallest step is 2 ** -9 of a scale.
    assert bool(((found - weight).abs() <= torch.maximum(weight.abs() / 16, spread * 2**-10) * 1.0001).all())
    inputs = torch.randn(260, 7).double()
    exact = weight.double() @ inputs
    assert float((found.double() @ inputs - exact).norm() / exact.norm()) < 0.04


def test_blocks_of_zeros_and_the_smallest_numbers_give_numbers() -> None:
    weight = torch.zeros(200, 130)
    weight[150, 129] = 1e-45
    blocks, scales = quantize(weight)
    assert not blocks.double().isnan().any() and float(scales[0, 0]) == 1.0
    assert float(dequantize(blocks, scales, torch.float32).abs().max()) <= 1e-45


def test_what_is_no_number_stays_none() -> None:
    """The canary is to see it."""
    weight = torch.randn(130, 130)
    weight[3, 4] = torch.nan
    found = dequantize(*quantize(weight), torch.float32)
    assert found[:128, :128].isnan().any() and not found[128:].isnan().any()


def test_matrices_of_layers_are_converted_and_nothing_else() -> None:
    for config in (QWEN, MOE):
        arch = architecture_of(config)
        plain, fp8 = engine_format(arch, fp8=False), engine_format(arch, fp8=True)
        assert plain.expected == plain.shapes and not plain.dtypes
        assert fp8.shapes == plain.shapes
        two = [name for name, shape in fp8.shapes.items() if len(shape) == 2 and ".layers." in name and "mlp.gate.w" not in name]
        assert fp8.converted == set(two) and len(two) == (14 if config is QWEN else 4 + 9 + 7)
        scales = {name.replace(".weight", ".weight_scale_inv"): scale_shape(fp8.shapes[name]) for name in two}
        assert dict(fp8.expected) == dict(plain.expected) | scales
        assert fp8.dtypes == dict.fromkeys(two, "float8_e4m3fn") | dict.fromkeys(scales, "float32")
        numbers = sum(torch.Size(fp8.shapes[name]).numel() for name in two)
        whole = sum(torch.Size(shape).numel() for shape in plain.shapes.values())
        num_scales = sum(torch.Size(shape).numel() for shape in scales.values())
        assert fp8.num_bytes(2) == numbers + 2 * (whole - numbers) + 4 * num_scales
    tower = engine_format(read_architecture(ARCHITECTURES / "Qwen2.5-VL-7B-Instruct"), fp8=True)
    assert not any("visual" in name for name in tower.converted) and any("visual" in name for name in tower.shapes)


def test_a_stream_in_the_engines_format_survives_who_fails() -> None:
    """What fails at one tensor does not keep the others from being gathered."""
    wanted = EngineFormat(
        shapes={"a.weight": (2, 3), "b.bias": (3,), "c.weight": (130, 4)}, converted=frozenset({"a.weight", "c.weight"})
    )
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in wanted.shapes.items()}
    found = list(EngineTensors(iter(tensors.items()), wanted))
    assert [name for name, _ in found] == list(wanted.expected)
    assert {name: tuple(tensor.shape) for name, tensor in found} == wanted.expected
    assert dict(found)["b.bias"] is tensors["b.bias"]
    drawn = []

    def broken() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in {**tensors, "a.weight": torch.randn(3)}.items():
            drawn.append(name)
            yield name, tensor

    stream = EngineTensors(broken(), wanted)
    with pytest.raises(ValueError, match="unpack"):
        list(stream)
    assert [name for name, _ in stream] == ["b.bias", "c.weight", "c.weight_scale_inv"] and drawn == list(tensors)


@pytest.mark.parametrize(
    ("changes", "tp", "words"),
    [
        ({}, 1, ""),
        ({}, 2, "keys and values of model.path are 64 wide on each of rollout.tp = 2 ranks"),
        ({"num_key_value_heads": 4}, 2, "the MLPs (intermediate_size) of model.path are 192 wide"),
        ({"num_key_value_heads": 4, "intermediate_size": 512}, 2, ""),
        ({"intermediate_size": 385}, 2, "the MLPs (intermediate_size) of model.path are 192.5 wide"),
        ({"hidden_size": 192, "head_dim": 64}, 1, "hidden states of model.path are 192 wide"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 128}, 2, ""),  # told of every engine
    ],
)
def test_widths_that_do_not_split_into_blocks_are_named(changes: dict[str, int], tp: int, words: str) -> None:
    problems = "; ".join(fp8_problems(architecture_of(QWEN | changes), tp))
    assert words in problems and bool(words) == bool(problems)


def test_experts_count_by_their_own_width() -> None:
    assert "experts of model.path are 64 wide" in "; ".join(fp8_problems(architecture_of(MOE | {"head_dim": 128}), 2))
    assert not list(fp8_problems(architecture_of(MOE | {"intermediate_size": 100, "mlp_only_layers": []}), 1))


def test_families_that_are_not_served_say_why() -> None:
    without = {name for name, family in FAMILIES.items() if family.without_fp8}
    assert without == {"deepseek", "deepseek_v2", "deepseek_v3", "llama", "phi3"}
    [problem] = fp8_problems(read_architecture(ARCHITECTURES / "Phi-3-mini-4k-instruct"), 1)
    assert "family phi3" in problem and "fused" in problem
