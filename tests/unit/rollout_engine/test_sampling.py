"""The draws follow the distribution that the settings describe, and depend on (seed, position) alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rlx.rollout.embedded.draws import uniform_draws
from rlx.rollout.embedded.sampling import SamplingColumns, sample

ROWS, VOCABULARY = 20_000, 23


def columns(temperature: float, top_p: float = 1.0, top_k: int = -1, rows: int = ROWS) -> SamplingColumns:
    return SamplingColumns(
        temperatures=np.full(rows, temperature, dtype=np.float32),
        top_p=np.full(rows, top_p),
        top_k=np.full(rows, top_k),
        seeds=np.arange(rows).astype(np.uint64) + np.uint64(random.randrange(2**40)),
    )


def kept_by_hand(probs: list[float], top_p: float, top_k: int) -> list[float]:
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept, before = [0.0] * len(probs), 0.0
    for rank, token in enumerate(order):
        if before <= top_p and (top_k < 0 or rank < top_k):
            kept[token] = probs[token]
        before += probs[token]
    return [value / sum(kept) for value in kept]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, -1), (0.6, 0.7, -1), (1.7, 1.0, 5), (1.2, 0.8, 4)])
def test_frequencies(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(VOCABULARY) * 2
    tokens, logprobs = sample(logits.expand(ROWS, -1), columns(temperature, top_p, top_k), np.full(ROWS, 11))
    full = torch.log_softmax(logits / temperature, -1)
    assert torch.allclose(logprobs, full[tokens], atol=1e-6)
    wanted = torch.tensor(kept_by_hand(full.exp().tolist(), top_p, top_k))
    found = torch.bincount(tokens, minlength=VOCABULARY) / ROWS
    assert (found[wanted == 0] == 0).all()
    assert ((found - wanted).abs() < 5 * (wanted * (1 - wanted) / ROWS).sqrt() + 1e-6).all()


def test_rows_are_independent_of_their_batch() -> None:
    logits = torch.randn(37, VOCABULARY)
    mixed = SamplingColumns(
        temperatures=np.where(np.arange(37) % 5 == 0, 0, np.random.rand(37) + 0.3).astype(np.float32),
        top_p=np.where(np.arange(37) % 3 == 0, 0.6, 1.0),
        top_k=np.where(np.arange(37) % 4 == 0, 3, -1),
        seeds=np.random.randint(0, 2**63, 37).astype(np.uint64),
    )
    positions = np.random.randint(0, 1000, 37)
    tokens, logprobs = sample(logits, mixed, positions)
    for row in range(37):
        one = slice(row, row + 1)
        alone, logprob = sample(logits[one], mixed.slice(one), positions[one])
        assert alone.item() == tokens[row].item() and logprob.item() == pytest.approx(logprobs[row].item(), abs=1e-6)
    assert tokens[0] == logits[0].argmax() and logprobs[0].item() == pytest.approx(torch.log_softmax(logits[0], -1).max().item())


def test_draws_are_uniform_and_unrelated_between_neighbours() -> None:
    seeds, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(200))
    draws = uniform_draws(seeds.ravel(), positions.ravel()).reshape(200, 300)
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(np.histogram(draws, 20, (0, 1))[0] / draws.size - 0.05).max() < 0.005
    for shifted in (draws[1:], draws[:, 1:], draws[1:, 1:]):
        base = draws[: shifted.shape[0], : shifted.shape[1]]
        assert abs(np.corrcoef(base.ravel(), shifted.ravel())[0, 1]) < 0.02


def test_logits_that_are_not_finite_show() -> None:
    logits = torch.randn(3, VOCABULARY)
    logits[1, 4] = float("nan")
    _, logprobs = sample(logits, columns(1.0, rows=3), np.zeros(3, dtype=np.int64))
    assert logprobs.isnan().tolist() == [False, True, False]
