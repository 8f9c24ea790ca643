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


def make_data(file: Path, shape: tuple[int, int, int], seed: int) -> dict[str, torch.Tensor]:
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
