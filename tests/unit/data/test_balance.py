"""Micro-batches of even work: what attention costs is counted, and dealt out within the budget of tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import AttentionCost, sizes_of
from rlx.config.packaged import packaged
from rlx.data.balance import Room, deal, fewest_bins, pack
from rlx.data.plan import Budget, plan_batch
from rlx.types.layout import BatchPlan, ParallelDims

SAMPLES = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 300)), min_size=1, max_size=50)
# Attention over 2,048 tokens costs as much as everything else together.
STEEP = AttentionCost(pair=1 / 1024 / 24, num_full=24)


def answers(num: int, seed: int) -> list[int]:
    """Log-normal lengths from 128 to 2,048."""
    rng = random.Random(seed)
    return [min(2048, max(128, round(math.exp(rng.gauss(math.log(600), 0.7))))) for _ in range(num)]


def work_of(plan: BatchPlan, lengths: Sequence[int], attention: AttentionCost) -> list[list[float]]:
    """Of each rank's micro-batches."""
    (mini_batch,) = plan.mini_batches
    return [
        [sum(lengths[index] + attention.of(lengths[index]) for index in micro_batch) for micro_batch in rank]
        for rank in mini_batch.micro_batches
    ]


def over_mean(numbers: Sequence[float]) -> float:
    return max(numbers) / fmean(numbers)


def in_waves(work: Sequence[Sequence[float]]) -> float:
    """How much longer all ranks take than the mean if each waits for the slowest after every micro-batch."""
    return sum(max(wave) for wave in zip(*work, strict=True)) / fmean(sum(rank) for rank in work)


def planned(lengths: Sequence[int], attention: AttentionCost | None, num_ranks: int, max_tokens: int) -> BatchPlan:
    load = Budget(max_tokens=max_tokens, attention=attention).load_of([(length,) for length in lengths])
    dims = ParallelDims(world_size=num_ranks)
    return plan_batch(lengths, lengths, dims=dims, num_mini_batches=1, max_tokens=max_tokens, load=load)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_work_is_even_where_tokens_alone_are_not(num_ranks: int, seed: int) -> None:
    lengths, max_tokens = answers(256, seed), 8192
    plan = planned(lengths, STEEP, num_ranks, max_tokens)
    work = work_of(plan, lengths, STEEP)
    by_tokens = work_of(planned(lengths, None, num_ranks, max_tokens), lengths, STEEP)
    assert over_mean(list(map(sum, work))) <= min(1.001, over_mean(list(map(sum, by_tokens))) + 1e-4)
    assert in_waves(work) <= min(1.005, in_waves(by_tokens))
    fewest = math.ceil(sum(lengths) / num_ranks / max_tokens)
    assert len(work[0]) <= fewest + 1, "the budget is used"


@pytest.mark.parametrize("seed", range(4))
def test_few_micro_batches_are_nearly_full(seed: int) -> None:
    lengths = answers(256, seed)
    (mini_batch,) = planned(lengths, STEEP, 1, 16_384).mini_batches
    assert len(mini_batch.micro_batches[0]) == math.ceil(sum(lengths) / 16_384)
    work = work_of(planned(lengths, STEEP, 1, 16_384), lengths, STEEP)
    assert over_mean(work[0]) <= 1.1


@settings(max_examples=80, deadline=None)
@given(SAMPLES, st.integers(60, 200), st.integers(1, 6))
def test_any_samples_are_dealt_once_within_the_budget(samples: list[tuple[int, int]], capacity: int, num_ranks: int) -> None:
    sizes = {index: size for index, (size, _) in enumerate(samples)}
    work = {index: size + more for index, (size, more) in enumerate(samples)}
    room = Room(sizes=sizes, capacity=capacity)
    ranks = deal(work, num_ranks)
    assert sorted(index for rank in ranks for index in rank) == list(sizes)
    loads = [sum(work[index] for index in rank) for rank in ranks]
    assert max(loads) - min(loads) <= max(work.values())
    count = max(fewest_bins(rank, work, room) for rank in ranks)
    for rank in ranks:
        for more in (0, 1):
            bins = pack(rank, work, room, count + more)
            assert len(bins) == count + more
            assert sorted(index for members in bins for index in members) == sorted(rank)
            assert all(sum(sizes[index] for index in members) <= capacity for members in bins)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 3))
def test_another_rule_than_the_budget_holds_too(kinds: list[int], most: int) -> None:
    def few_kinds(members: object) -> bool:
        assert isinstance(members, list)
        return len({kinds[index] for index in members}) <= most

    numbers = dict.fromkeys(range(len(kinds)), 3)
    room = Room(sizes=numbers, capacity=24, allows=few_kinds)
    count = fewest_bins(list(numbers), numbers, room)
    bins = pack(list(numbers), numbers, room, count)
    assert sorted(index for members in bins for index in members) == list(numbers)
    assert all(few_kinds(members) and 3 * len(members) <= 24 for members in bins)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 3), st.integers(0, 3))
def test_attention_counts_the_tokens_that_are_seen(num_tokens: int, window: int, num_full: int, num_windowed: int) -> None:
    cost = AttentionCost(pair=0.5, num_full=num_full, num_windowed=num_windowed, window=window)
    seen = sum(num_full * place + num_windowed * min(place, window) for place in range(1, num_tokens + 1))
    assert cost.of(num_tokens) == pytest.approx(0.5 * seen)


def test_coefficients_by_hand() -> None:
    """Llama-3.1-8B: 32 layers of 32 heads of 128, 7.5 billion parameters at work on a token."""
    folder = packaged("configs/architectures")
    assert folder is not None
    sizes = sizes_of(read_architecture(str(folder / "Llama-3.1-8B")))
    assert sizes.active == pytest.approx(sizes.total - sizes.embedding, rel=1e-5)
    cost = sizes.attention_cost
    assert (cost.num_full, cost.num_windowed) == (32, 0)
    assert cost.pair == pytest.approx(32 * 2 * 128 / 7.5047e9, rel=1e-3)
    experts = sizes_of(read_architecture(str(folder / "Qwen3-30B-A3B")))
    assert experts.active == pytest.approx(3.05e9, rel=0.03)
    windowed = sizes_of(read_architecture(str(folder / "gemma-2-9b-it"))).attention_cost
    assert (windowed.num_full, windowed.num_windowed, windowed.window) == (21, 21, 4096)
