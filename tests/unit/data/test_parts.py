"""Batches as arrays: what they hold, which rows a data-parallel rank gets, and how they travel."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.data.plan import part_of, plan_batch
from rlx.trainer.batch import RankBatch, position_mask, position_rollout_logprobs
from rlx.types.batch import MicroBatch
from rlx.types.layout import BatchPlan, ParallelDims
from rlx.types.rollout import ImageSpan
from rlx.types.train_batch import BatchPart, MiniBatchPart, TrainBatch, TrainSample
from tests.batches import batch_of, train_sample
from tests.unit.data.contexts import rank_context


def numbered(lengths: list[int]) -> TrainBatch:
    """Sequence i has the tokens 100 i, 100 i + 1, ...; all but its first are learnt from."""
    return batch_of(
        [
            train_sample(
                sample_id=index,
                group_id=index // 2,
                token_ids=[100 * index + position for position in range(length)],
                loss_mask=[0, *[1] * (length - 1)],
                rollout_logprobs=[-0.25 * position for position in range(length)],
                reward=index / 3,
                scalar_advantage=index / 7,
                weight_version=index % 3,
            )
            for index, length in enumerate(lengths)
        ]
    )


def planned(batch: TrainBatch, dims: ParallelDims, num_mini_batches: int = 1, max_tokens: int = 64) -> BatchPlan:
    return plan_batch(batch.lengths, batch.loss_tokens, dims=dims, num_mini_batches=num_mini_batches, max_tokens=max_tokens)


def same(one: TrainSample, other: TrainSample) -> bool:
    numbers = ("sample_id", "group_id", "reward", "scalar_advantage", "weight_version")
    columns = ("token_ids", "loss_mask", "rollout_logprobs")
    return all(getattr(one, name) == getattr(other, name) for name in numbers) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in columns
    )


def test_the_example_of_the_docstring() -> None:
    rows = [train_sample(sample_id=0, group_id=5, token_ids=(1, 2, 7, 8), loss_mask=(0, 0, 1, 1), reward=1.0, weight_version=3)]
    rows.append(train_sample(sample_id=1, group_id=5, token_ids=(1, 2, 9), loss_mask=(0, 0, 1), weight_version=3))
    batch = batch_of(rows)
    assert batch.token_ids.tolist() == [1, 2, 7, 8, 1, 2, 9] and batch.offsets.tolist() == [0, 4, 7]
    assert (batch.lengths, batch.loss_tokens, batch.num_tokens, len(batch)) == ([4, 3], [2, 1], 7, 2)
    last = batch.rows([1])
    assert last.token_ids.tolist() == [1, 2, 9] and last.offsets.tolist() == [0, 3] and last.sample_ids.tolist() == [1]
    assert same(last[0], batch[1]) and batch[1].scalar_advantage is None
    bytes_a_token = batch.token_ids.itemsize + batch.loss_mask.itemsize + batch.rollout_logprobs.itemsize
    assert bytes_a_token == 9


def test_a_view_writes_through_and_rows_are_copies() -> None:
    batch = numbered([3, 2])
    copied = batch.rows([0])
    batch[0].token_ids[1] = 77
    assert batch.token_ids[1] == 77 and copied.token_ids[1] == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=24), st.integers(1, 9), st.integers(1, 4), st.integers(40, 99))
def test_ranks_together_hold_every_row_once_in_the_order_of_their_micro_batches(
    lengths: list[int], dp: int, num_mini_batches: int, max_tokens: int
) -> None:
    batch, dims = numbered(lengths), ParallelDims(world_size=dp)
    plan = planned(batch, dims, num_mini_batches, max_tokens)
    found: list[int] = []
    for dp_rank in range(dp):
        part = pickle.loads(pickle.dumps(part_of(batch, plan, dp_rank), protocol=5))
        found += part.samples.sample_ids.tolist()
        assert part.group_ids.tolist() == batch.group_ids.tolist()
        held, samples = [], iter(part.samples)
        for mine, whole in zip(part.mini_batches, plan.mini_batches, strict=True):
            assert (mine.num_loss_tokens, mine.num_sequences) == (whole.num_loss_tokens, whole.num_sequences)
            held += [tuple(next(samples) for _ in range(size)) for size in mine.micro_batch_sizes]
        wanted = [ids for mini_batch in plan.mini_batches for ids in mini_batch.micro_batches[dp_rank]]
        assert [tuple(sample.sample_id for sample in ids) for ids in held] == wanted
        assert all(same(sample, batch[sample.sample_id]) for ids in held for sample in ids)
    assert sorted(found) == list(range(len(lengths)))


def packs_of(part: BatchPart, dims: ParallelDims, mini_batch: int) -> list[MicroBatch]:
    return RankBatch(part, rank_context(dims, part.dp_rank)).packs(mini_batch)


def test_a_rank_packs_what_the_plan_says() -> None:
    batch, dims = numbered([5, 3, 4, 2, 6]), ParallelDims(world_size=2)
    plan = planned(batch, dims, num_mini_batches=2, max_tokens=8)
    for dp_rank in (0, 1):
        part = part_of(batch, plan, dp_rank)
        for number, mini_batch in enumerate(plan.mini_batches):
            packs = packs_of(part, dims, number)
            assert [pack.sample_ids for pack in packs] == [ids or (-1,) for ids in mini_batch.micro_batches[dp_rank]]
            for pack in packs:
                tokens = [token for index in pack.sample_ids if index >= 0 for token in batch[index].token_ids.tolist()]
                assert pack.tokens_T.tolist() == tokens or pack.sample_ids == (-1,)


def test_fewer_samples_than_ranks_leave_masked_padding() -> None:
    batch, dims = numbered([4]), ParallelDims(world_size=3)
    plan = planned(batch, dims)
    parts = [pickle.loads(pickle.dumps(part_of(batch, plan, dp_rank), protocol=5)) for dp_rank in range(3)]
    assert [len(part.samples) for part in parts] == [1, 0, 0]
    (pack,) = packs_of(parts[2], dims, 0)
    assert pack.sample_ids == (-1,) and not pack.loss_mask_T.any()
    rank = RankBatch(parts[2], rank_context(dims, 2))
    assert rank.samples == [] and rank.group_ids == [0] and rank.counts(0).num_loss_tokens == 3


def test_a_rank_gets_the_images_of_its_own_rows() -> None:
    red, blue = "ab" * 32, "0c" * 32
    spans = [
        (ImageSpan(key=red, start=1, grid=(1, 2, 4)), ImageSpan(key=blue, start=4, grid=(1, 4, 2))),
        (),
        (ImageSpan(key=red, start=2, grid=(1, 2, 4)),),
    ]
    samples = [replace(sample, images=images) for sample, images in zip(numbered([9, 3, 6]), spans, strict=True)]
    batch, dims = batch_of(samples), ParallelDims(world_size=2)
    assert [sample.images for sample in batch] == spans
    assert batch.images is not None and batch.images.keys.shape == (2, 32) and batch.images.key_index.tolist() == [0, 1, 0]
    plan = planned(batch, dims)
    for dp_rank in (0, 1):
        part = pickle.loads(pickle.dumps(part_of(batch, plan, dp_rank), protocol=5))
        assert [sample.images for sample in part.samples] == [spans[index] for index in part.samples.sample_ids]
    assert batch.rows([1]).images is None and numbered([3]).images is None
    both = batch.rows([2, 0])
    assert both.images is not None and both.images.sequences.tolist() == [0, 1, 1]
    (pack,) = packs_of(part_of(batch, planned(batch, ParallelDims(world_size=1)), 0), ParallelDims(world_size=1), 0)
    starts = dict(zip(pack.sample_ids, pack.cu_seqlens_S1.tolist(), strict=False))
    wanted = [(span.key, starts[index] + span.start) for index in pack.sample_ids for span in spans[index]]
    assert [(span.key, span.start) for span in pack.images] == wanted


@pytest.mark.parametrize("critic", [False, True])
def test_a_part_travels_in_five_buffers_and_arrives_writable(critic: bool) -> None:
    """However many columns there are: the driver pays for each buffer, on each rank."""
    batch = numbered([4, 0, 3])
    whole = replace(batch, scalar_advantages=None) if critic else batch
    sent = BatchPart(dp_rank=1, samples=whole, mini_batches=(MiniBatchPart((2, 1), 5, 2),), group_ids=batch.group_ids)
    buffers: list[pickle.PickleBuffer] = []
    payload = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 5 and len(payload) < 400
    part = pickle.loads(payload, buffers=[bytearray(buffer.raw()) for buffer in buffers])
    assert (part.dp_rank, part.mini_batches, part.group_ids.tolist()) == (1, sent.mini_batches, batch.group_ids.tolist())
    for entry in fields(TrainBatch):
        here, there = getattr(part.samples, entry.name), getattr(whole, entry.name)
        if there is None:
            assert here is None
        else:
            assert here.dtype == there.dtype and here.tobytes() == there.tobytes() and here.flags.writeable


def test_a_part_of_another_rank_is_refused() -> None:
    batch, dims = numbered([4, 4]), ParallelDims(world_size=2)
    with pytest.raises(AssertionError, match="data-parallel rank 0 was sent the part of 1"):
        RankBatch(part_of(batch, planned(batch, dims), 1), rank_context(dims, 0))


def test_one_token_and_the_shift_to_positions() -> None:
    one, three = numbered([1]), numbered([3])
    assert position_mask(one[0]).tolist() == [0.0] and position_rollout_logprobs(one[0]).tolist() == [0.0]
    assert position_mask(three[0]).tolist() == [1.0, 1.0, 0.0] and position_mask(three[0]).dtype == torch.float32
    assert position_rollout_logprobs(three[0]).tolist() == [-0.25, -0.5, 0.0]


def test_log_probs_are_rounded_as_torch_rounds_them() -> None:
    values = [-0.1, -1e-9, -3.3333333333333335, -17.123456789012345, -1.0000000596046448]
    sample = train_sample(token_ids=range(6), loss_mask=[0, *[1] * 5], rollout_logprobs=[0.0, *values])
    assert torch.equal(position_rollout_logprobs(sample), torch.tensor([*values, 0.0], dtype=torch.float32))
