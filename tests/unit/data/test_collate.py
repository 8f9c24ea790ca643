"""Packing and unpacking against a token-by-token reading of the samples."""

from __future__ import annotations

import random

import pytest
import torch

from rlx.data.collate import collate, split_columns
from rlx.types.batch import Columns
from rlx.types.layout import ParallelDims
from rlx.types.train_batch import TrainSample
from tests.batches import train_sample

LAYOUTS = [
    ParallelDims(world_size=1),
    ParallelDims(world_size=2, tp=2, sequence_parallel=True),
    ParallelDims(world_size=3, cp=3),
    ParallelDims(world_size=4, tp=2, cp=2, sequence_parallel=True),
]


def random_samples(num: int, seed: int) -> list[TrainSample]:
    """Ids that are no indices; masks with holes, as in several turns."""
    draw = random.Random(seed)
    samples = []
    for index in range(num):
        prompt, response = draw.randint(1, 7), draw.randint(1, 13)
        mask = (0,) * prompt + tuple(draw.choice([1, 1, 0]) for _ in range(response - 1)) + (1,)
        samples.append(
            train_sample(
                sample_id=100 + 3 * index,
                group_id=index // 2,
                token_ids=tuple(draw.randint(1, 999) for _ in mask),
                loss_mask=mask,
                rollout_logprobs=tuple(-draw.random() * m for m in mask),
                reward=1.0,
            )
        )
    return samples


@pytest.mark.parametrize("dims", LAYOUTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_every_position_predicts_the_next_token_of_its_own_sequence(dims: ParallelDims, seed: int) -> None:
    samples = random_samples(5, seed)
    chosen = [samples[3], samples[0], samples[4]]
    values = {sample.sample_id: torch.randn(len(sample.token_ids)) for sample in samples}
    batch = collate(samples, [sample.sample_id for sample in chosen], dims, Columns(old_logprobs=values))

    borders = batch.cu_seqlens_S1.tolist()
    assert borders[0] == 0 and borders[-1] == len(batch.tokens_T) and len(borders) == 4
    assert len(batch.tokens_T) % dims.pack_multiple == 0
    assert all(border % dims.sequence_multiple == 0 for border in borders)
    assert batch.sample_ids == tuple(sample.sample_id for sample in chosen)
    assert batch.lengths_S.tolist() == [len(sample.token_ids) for sample in chosen]
    for start, end, sample in zip(borders, borders[1:], chosen, strict=False):
        length = len(sample.token_ids)
        assert end - start < length + max(dims.sequence_multiple, dims.pack_multiple)
        for offset in range(end - start):
            position, predicts = start + offset, offset + 1 < length
            assert batch.tokens_T[position] == (sample.token_ids[offset] if offset < length else 0)
            assert batch.labels_T[position] == (sample.token_ids[offset + 1] if predicts else 0)
            assert batch.loss_mask_T[position] == (sample.loss_mask[offset + 1] if predicts else 0)
    assert batch.loss_mask_T.sum() == sum(sample.num_loss_tokens for sample in chosen)
    laid = batch.columns.old_logprobs
    assert laid is not None
    split = split_columns(laid, batch)
    assert list(split) == [sample.sample_id for sample in chosen]
    assert all(torch.equal(split[sample_id], values[sample_id]) for sample_id in split)


@pytest.mark.parametrize("dims", LAYOUTS, ids=str)
def test_an_empty_micro_batch_is_one_masked_sequence(dims: ParallelDims) -> None:
    batch = collate(random_samples(2, 0), [], dims, Columns(advantages={}))
    assert batch.sample_ids == (-1,)
    assert len(batch.tokens_T) >= 2 and len(batch.tokens_T) % dims.pack_multiple == 0
    assert batch.cu_seqlens_S1.tolist() == [0, len(batch.tokens_T)] and batch.max_seqlen == len(batch.tokens_T)
    (column,) = batch.columns.present()
    assert not batch.loss_mask_T.any() and column[0] == "advantages"
    assert split_columns(column[1], batch) == {}


def test_split_results_do_not_share_memory() -> None:
    samples = random_samples(1, 4)
    batch = collate(samples, [100], LAYOUTS[0])
    values_T = torch.randn(len(batch.tokens_T))
    before = values_T.clone()
    split_columns(values_T, batch)[100].zero_()
    assert torch.equal(values_T, before)


def test_errors_name_the_sample_and_the_column() -> None:
    samples = random_samples(2, 1)
    with pytest.raises(ValueError, match="7"):
        collate(samples, [7], LAYOUTS[0])
    with pytest.raises(ValueError, match="values has nothing for sample 103"):
        collate(samples, [103], LAYOUTS[0], Columns(values={}))
    with pytest.raises(ValueError, match=r"values, sample 100: shape \(1,\)"):
        collate(samples, [100], LAYOUTS[0], Columns(values={100: torch.zeros(1)}))
    with pytest.raises(ValueError, match="99 values"):
        split_columns(torch.zeros(99), collate(samples, [100], LAYOUTS[0]))


def test_columns_that_are_not_there_are_left_out() -> None:
    columns = Columns(values=torch.ones(2), old_logprobs=torch.zeros(2))
    assert [name for name, _ in columns.present()] == ["old_logprobs", "values"]
    doubled = columns.map(lambda name, column: f"{name} {float(column.sum() * 2)}")
    assert (doubled.old_logprobs, doubled.values, doubled.returns) == ("old_logprobs 0.0", "values 4.0", None)
