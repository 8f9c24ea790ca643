"""Log-probs and entropy over a split vocabulary against float64 softmax on one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.launch import run_ranks

# (tokens, hidden, vocabulary): odd everywhere; the last leaves one of three ranks with padding rows alone.
SHAPES = [(13, 6, 37), (1, 4, 5), (5, 3, 4)]
# Soft caps that bite: logits reach far beyond them.
SCALINGS = [{"temperature": 1.0}, {"temperature": 0.7}, {"softcap": 30.0}, {"temperature": 0.7, "softcap": 20.0}]


def make_data(file: Path, shape: tuple[int, int, int], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tokens, hidden, vocab = shape
    generator = torch.Generator().manual_seed(seed)
    data = {
        # Logits far apart: probabilities underflow for some of them.
        "hidden": 6 * torch.randn(tokens, hidden, generator=generator),
        "weight": 3 * torch.randn(vocab, hidden, generator=generator),
        "labels": torch.randint(0, vocab, (tokens,), generator=generator),
        "logprob_slope": torch.randn(tokens, generator=generator),
        "entropy_slope": torch.randn(tokens, generator=generator),
    }
    data |= {name: data[name].to(dtype) for name in ("hidden", "weight")}
    torch.save(data, file)
    return data


def reference(data: dict[str, torch.Tensor], scaling: dict[str, float]) -> dict[str, torch.Tensor]:
    hidden = data["hidden"].double().requires_grad_()
    weight = data["weight"].double().requires_grad_()
    logits = hidden @ weight.t()
    if "softcap" in scaling:
        logits = torch.tanh(logits / scaling["softcap"]) * scaling["softcap"]
    logprobs_all = (logits / scaling.get("temperature", 1.0)).log_softmax(-1)
    logprobs = logprobs_all.gather(1, data["labels"][:, None]).squeeze(1)
    entropy = -(logprobs_all.exp() * logprobs_all).sum(-1)
    (logprobs * data["logprob_slope"] + entropy * data["entropy_slope"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"logprobs": logprobs, "entropy": entropy, "hidden_grad": hidden.grad, "weight_grad": weight.grad}


@pytest.mark.parametrize("world_size", [1, 3])
def test_split_vocabulary_equals_float64(world_size: int, tmp_path: Path) -> None:
    cases, expected = [], []
    for seed, shape in enumerate(SHAPES):
        for number, scaling in enumerate(SCALINGS):
            file = tmp_path / f"{seed}-{number}.pt"
            data = make_data(file, shape, seed)
            for chunk_bytes in (1, 10**9):
                cases.append({"data": str(file), "scaling": scaling, "chunk_bytes": chunk_bytes})
                expected.append(reference(data, scaling))
    run_ranks("tests.dist.programs.vocab", world_size, {"cases": cases}, tmp_path / "out.pt")
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    for case, found, wanted in zip(cases, results, expected, strict=True):
        for name, value in wanted.items():
            scale = float(value.detach().abs().max().clamp_min(1.0))
            assert float((found[name].double() - value.detach()).abs().max()) <= 1e-5 * scale, (case, name)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_bf16_output_layer_with_fp32_logits_equals_float64(world_size: int, tmp_path: Path) -> None:
    """Only gradients, which leave in bf16, may be off by its rounding; with logits in bf16 everything is."""
    cases, expected = [], []
    for number, scaling in enumerate(SCALINGS):
        file = tmp_path / f"{number}.pt"
        data = make_data(file, (29, 6, 37), number, torch.bfloat16)
        for fp32 in (True, False):
            cases.append({"data": str(file), "scaling": {**scaling, "fp32": fp32}, "chunk_bytes": 1000})
            expected.append(reference(data, scaling))
    run_ranks("tests.dist.programs.vocab", world_size, {"cases": cases}, tmp_path / "out.pt")
    for case, found, wanted in zip(cases, torch.load(tmp_path / "out.pt", weights_only=True), expected, strict=True):
        off = {name: float((found[name].double() - value.detach()).abs().max()) for name, value in wanted.items()}
        if not case["scaling"]["fp32"]:
            assert off["logprobs"] > 0.03, case
            continue
        assert found["weight_grad"].dtype == found["hidden_grad"].dtype == torch.bfloat16
        for name, limit in (("logprobs", 1e-5), ("entropy", 1e-5), ("hidden_grad", 0.01), ("weight_grad", 0.01)):
            assert off[name] <= limit * float(wanted[name].detach().abs().max().clamp_min(1.0)), (case, name)
