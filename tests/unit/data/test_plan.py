"""Each invariant of ``rlx.data.plan``, on random batches and layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from rlx.data.plan import Budget, plan_batch, round_up
from rlx.types.layout import BatchPlan, ParallelDims
from rlx.types.rollout import ImageSpan


@st.composite
def layouts(draw: st.DrawFn) -> ParallelDims:
    tp, cp, pp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    dp = draw(st.integers(1, 5))
    return ParallelDims(
        world_size=tp * cp * pp * dp, tp=tp, cp=cp, pp=pp, vpp=vpp, sequence_parallel=tp > 1 and draw(st.booleans())
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """lengths, loss tokens, mini-batches, token budget (never below the longest sample)."""
    lengths = draw(st.lists(st.integers(2, 60), min_size=1, max_size=40))
    loss_tokens = [draw(st.integers(1, length - 1)) for length in lengths]
    return lengths, loss_tokens, draw(st.integers(1, 5)), max(lengths) + draw(st.integers(0, 150))


def plan_of(batch: tuple[list[int], list[int], int, int], dims: ParallelDims) -> BatchPlan:
    lengths, loss_tokens, num_mini_batches, max_tokens = batch
    return plan_batch(lengths, loss_tokens, dims=dims, num_mini_batches=num_mini_batches, max_tokens=max_tokens)


def members(plan: BatchPlan) -> list[list[int]]:
    return [sorted(i for rank in mini.micro_batches for micro in rank for i in micro) for mini in plan.mini_batches]


@settings(max_examples=60, deadline=None)
@given(batches(), layouts())
def test_every_sample_exactly_once(batch: tuple[list[int], list[int], int, int], dims: ParallelDims) -> None:
    found = Counter(index for mini in members(plan_of(batch, dims)) for index in mini)
    assert found == Counter(range(len(batch[0])))


@settings(max_examples=60, deadline=None)
@given(batches(), layouts())
def test_ranks_have_equally_many_micro_batches(batch: tuple[list[int], list[int], int, int], dims: ParallelDims) -> None:
    for mini in plan_of(batch, dims).mini_batches:
        assert len(mini.micro_batches) == dims.dp
        (count,) = {len(rank) for rank in mini.micro_batches}
        assert count >= 1
        assert dims.vpp == 1 or count % dims.pp == 0


@settings(max_examples=60, deadline=None)
@given(batches(), layouts())
def test_micro_batches_keep_to_the_budget(batch: tuple[list[int], list[int], int, int], dims: ParallelDims) -> None:
    for mini in plan_of(batch, dims).mini_batches:
        for micro in (micro for rank in mini.micro_batches for micro in rank if len(micro) > 1):
            padded = sum(round_up(batch[0][index], dims.sequence_multiple) for index in micro)
            assert round_up(padded, dims.pack_multiple) <= batch[3]


@settings(max_examples=60, deadline=None)
@given(batches(), layouts(), layouts())
def test_mini_batches_do_not_depend_on_the_layout(
    batch: tuple[list[int], list[int], int, int], dims: ParallelDims, other: ParallelDims
) -> None:
    found = members(plan_of(batch, dims))
    assert found == members(plan_of(batch, other))
    assert [index for mini in found for index in mini] == list(range(len(batch[0])))
    sizes = [len(mini) for mini in found]
    assert len(sizes) == min(batch[2], len(batch[0])) and max(sizes) - min(sizes) <= 1


@settings(max_examples=60, deadline=None)
@given(batches(), layouts())
def test_ranks_are_balanced(batch: tuple[list[int], list[int], int, int], dims: ParallelDims) -> None:
    for mini, indices in zip(plan_of(batch, dims).mini_batches, members(plan_of(batch, dims)), strict=True):
        padded = {index: round_up(batch[0][index], dims.sequence_multiple) for index in indices}
        loads = [sum(padded[index] for micro in rank for index in micro) for rank in mini.micro_batches]
        assert max(loads) - min(loads) <= max(padded.values())


@settings(max_examples=30, deadline=None)
@given(batches(), layouts())
def test_counts_and_determinism(batch: tuple[list[int], list[int], int, int], dims: ParallelDims) -> None:
    plan = plan_of(batch, dims)
    assert plan == plan_of(batch, dims)
    for mini, indices in zip(plan.mini_batches, members(plan), strict=True):
        assert mini.num_sequences == len(indices)
        assert mini.num_loss_tokens == sum(batch[1][index] for index in indices)


def test_fewer_samples_than_ranks() -> None:
    plan = plan_batch([5, 9], [2, 3], dims=ParallelDims(world_size=4), num_mini_batches=1, max_tokens=16)
    (mini,) = plan.mini_batches
    assert sorted(mini.micro_batches) == [((),), ((),), ((0,),), ((1,),)]


def test_short_samples_share_a_micro_batch() -> None:
    plan = plan_batch([3] * 64, [1] * 64, dims=ParallelDims(world_size=2), num_mini_batches=1, max_tokens=96)
    assert len(plan.mini_batches[0].micro_batches[0]) == 1
    assert plan_batch([], [], dims=ParallelDims(world_size=2), num_mini_batches=2, max_tokens=9).mini_batches == ()


def test_errors_name_the_key() -> None:
    dims = ParallelDims(world_size=1)
    with pytest.raises(ValueError, match=r"17 tokens.*batching\.max_tokens_per_micro_batch"):
        plan_batch([4, 17], [1, 1], dims=dims, num_mini_batches=1, max_tokens=16)
    with pytest.raises(ValueError, match="2 lengths"):
        plan_batch([4, 5], [1], dims=dims, num_mini_batches=1, max_tokens=16)
    with pytest.raises(ValueError, match="num_mini_batches"):
        plan_batch([4], [1], dims=dims, num_mini_batches=0, max_tokens=16)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_data_parallel_ranks_are_numbered_as_megatron_numbers_them(dims: ParallelDims) -> None:
    generator = RankGenerator(tp=dims.tp, ep=1, dp=dims.dp, pp=dims.pp, cp=dims.cp, order="tp-cp-ep-dp-pp")
    for group in generator.get_ranks("dp"):
        assert [dims.dp_rank_of(rank) for rank in group] == list(range(dims.dp))
    assert ParallelDims(world_size=8, tp=2, pp=2).dp_rank_of(6) == 1


def spans_of(names: Sequence[str], sides: Mapping[str, int]) -> tuple[ImageSpan, ...]:
    return tuple(ImageSpan(key=name, start=0, grid=(1, sides[name], 2)) for name in names)


@settings(max_examples=60, deadline=None)
@given(batches(), layouts(), st.data())
def test_images_have_a_budget_of_their_own_and_are_work(
    batch: tuple[list[int], list[int], int, int], dims: ParallelDims, data: st.DataObject
) -> None:
    lengths, loss_tokens, num_mini_batches, max_tokens = batch
    sides = {name: data.draw(st.integers(1, 20)) for name in "abcdef"}
    names = [data.draw(st.lists(st.sampled_from("abcdef"), max_size=2, unique=True)) for _ in lengths]
    images = [spans_of(of_one, sides) for of_one in names]
    most = max((sum(2 * sides[name] for name in of_one) for of_one in names), default=1) + data.draw(st.integers(1, 30))
    load = Budget(max_tokens=max_tokens, max_patches=most, patch_cost=0.5).load_of([()] * len(lengths), images)
    plan = plan_batch(lengths, loss_tokens, dims=dims, num_mini_batches=num_mini_batches, max_tokens=max_tokens, load=load)
    found = Counter(index for mini in members(plan) for index in mini)
    assert found == Counter(range(len(lengths)))
    work = [
        round_up(length, dims.sequence_multiple) + sum(sides[n] for n in of_one)
        for length, of_one in zip(lengths, names, strict=True)
    ]
    for mini in plan.mini_batches:
        for rank in mini.micro_batches:
            for micro in rank:
                different = {name for index in micro for name in names[index]}
                assert sum(2 * sides[name] for name in different) <= most
        totals = [sum(work[index] for micro in rank for index in micro) for rank in mini.micro_batches]
        largest = max(work[index] for rank in mini.micro_batches for micro in rank for index in micro)
        assert max(totals) - min(totals) <= largest


def test_a_group_pays_once_for_the_image_that_it_shares() -> None:
    budget = Budget(max_tokens=64, max_patches=30, patch_cost=0.1)
    shared, different = [spans_of("a", {"a": 12})] * 4, [spans_of(name, {name: 12}) for name in "abcd"]
    for images, num_packs in ((shared, 1), (different, 4)):
        load = budget.load_of([(8,)] * 4, images)
        plan = plan_batch([8] * 4, [4] * 4, dims=ParallelDims(world_size=1), num_mini_batches=1, max_tokens=64, load=load)
        assert len(plan.mini_batches[0].micro_batches[0]) == num_packs
    assert not budget.load_of([(8,), (8,)], [(), ()]).is_limited


def test_images_that_never_fit_are_refused() -> None:
    load = Budget(max_tokens=64, max_patches=23, patch_cost=0.1).load_of([(8,)], [spans_of("a", {"a": 12})])
    with pytest.raises(ValueError, match=r"have 24 patches, more than batching.max_patches_per_micro_batch = 23"):
        plan_batch([8], [4], dims=ParallelDims(world_size=1), num_mini_batches=1, max_tokens=64, load=load)
