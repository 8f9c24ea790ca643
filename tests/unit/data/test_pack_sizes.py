"""Micro-batches of few sizes, so that nothing is compiled anew for each."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.config.schema import BatchingConfig
from rlx.data.plan import Budget, part_of, plan_batch
from rlx.parallel.packing import PackSizes, longest_bound
from rlx.trainer.batch import RankBatch
from rlx.types.layout import ParallelDims
from tests.batches import batch_of, train_sample
from tests.unit.data.contexts import rank_context


def on(device: str, dims: ParallelDims) -> Any:
    return SimpleNamespace(dims=dims, device=torch.device(device))


def test_sizes_by_hand() -> None:
    one, cut = ParallelDims(world_size=1), ParallelDims(world_size=6, tp=2, cp=3, sequence_parallel=True)
    budget = BatchingConfig(max_tokens_per_micro_batch=16_384)
    assert PackSizes.of(budget, on("cuda", one)) == PackSizes(multiple=256, most=16_384)
    assert PackSizes.of(budget, on("cpu", one)) == PackSizes(multiple=1, most=16_384)
    assert PackSizes.of(budget, on("cuda", cut)) == PackSizes(multiple=768, most=16_380)
    assert PackSizes.of(BatchingConfig(max_tokens_per_micro_batch=40), on("cuda", one)).multiple == 1
    asked = BatchingConfig(max_tokens_per_micro_batch=100, pad_to_multiple_of=30)
    assert PackSizes.of(asked, on("cpu", cut)) == PackSizes(multiple=60, most=96)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.integers(1, 50), st.integers(0, 60))
def test_packs_have_few_sizes_within_the_budget_and_the_same_samples(lengths: list[int], multiple: int, more: int) -> None:
    dims, max_tokens = ParallelDims(world_size=1), max(lengths) + more
    rows = [
        train_sample(sample_id=index, token_ids=list(range(1, length + 1)), loss_mask=[0, *[1] * (length - 1)])
        for index, length in enumerate(lengths)
    ]
    batch = batch_of(rows)
    plan = plan_batch(lengths, batch.loss_tokens, dims=dims, num_mini_batches=1, max_tokens=max_tokens)
    part = part_of(batch, plan, 0)
    plain, padded = (
        RankBatch(part, rank_context(dims), sizes).packs(0) for sizes in (None, PackSizes(multiple=multiple, most=max_tokens))
    )
    for bare, pack in zip(plain, padded, strict=True):
        num_tokens = pack.tokens_T.shape[0]
        assert num_tokens % multiple == 0 or num_tokens == max_tokens
        assert bare.tokens_T.shape[0] <= num_tokens <= max_tokens
        assert pack.loss_mask_T.sum() == bare.loss_mask_T.sum() and pack.cu_seqlens_S1[-1] == num_tokens
        assert torch.equal(pack.tokens_T[: bare.tokens_T.shape[0]], bare.tokens_T)
        assert torch.equal(pack.lengths_S, bare.lengths_S) and pack.sample_ids == bare.sample_ids


def test_padding_costs_little_and_leaves_few_sizes() -> None:
    """Log-normal answers of 128 to 2,048 tokens: at most 1.5 % more tokens."""
    sizes = PackSizes(multiple=256, most=16_384)
    bare, padded, seen, bounds = 0, 0, set(), set()
    for seed in range(8):
        rng = random.Random(seed)
        lengths = [90 + min(2048, max(128, round(math.exp(rng.gauss(math.log(600), 0.7))))) for _ in range(256)]
        load = Budget(max_tokens=16_384).load_of([(length,) for length in lengths])
        dims = ParallelDims(world_size=2)
        plan = plan_batch(lengths, lengths, dims=dims, num_mini_batches=1, max_tokens=16_384, load=load)
        for rank in plan.mini_batches[0].micro_batches:
            for micro_batch in rank:
                total = sum(lengths[index] for index in micro_batch)
                size = min(sizes.most, -(-total // sizes.multiple) * sizes.multiple)
                bare, padded = bare + total, padded + size
                seen.add(size)
                bounds.add(longest_bound(max(lengths[index] for index in micro_batch), 1))
    assert padded / bare <= 1.015
    assert len(seen) <= 12 and len(bounds) <= 4


@pytest.mark.parametrize("multiple", [1, 4, 6])
def test_the_longest_sequence_has_few_bounds(multiple: int) -> None:
    bounds = [longest_bound(length, multiple) for length in range(1, 5000)]
    assert all(bound >= length and bound % multiple == 0 for length, bound in enumerate(bounds, 1))
    assert bounds == sorted(bounds)
    assert all(bound <= max(64 * multiple, length * 1.25 + 64 * multiple) for length, bound in enumerate(bounds, 1))
    assert len(set(bounds)) <= 26
