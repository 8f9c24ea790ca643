"""Batches from samples that are written out, for tests and benchmarks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlx.data.plan import part_of
from rlx.types.image_arrays import ImageArrays
from rlx.types.layout import BatchPlan
from rlx.types.train_batch import BatchPart, TrainBatch, TrainSample


def train_sample(
    *,
    token_ids: Sequence[int],
    loss_mask: Sequence[int],
    rollout_logprobs: Sequence[float] | None = None,
    sample_id: int = 0,
    group_id: int = 0,
    **numbers: Any,
) -> TrainSample:
    """One sample on its own; ``numbers`` are its reward and so on."""
    return TrainSample(
        sample_id=sample_id,
        group_id=group_id,
        token_ids=np.array(token_ids, np.int32),
        loss_mask=np.array(loss_mask, np.bool_),
        rollout_logprobs=np.array([0.0] * len(token_ids) if rollout_logprobs is None else rollout_logprobs, np.float32),
        **{"reward": 0.0} | numbers,
    )


def random_samples(vocab_size: int, lengths: Sequence[int], prompt: int, group: int = 4, seed: int = 5) -> list[TrainSample]:
    """Samples of these lengths with random tokens, ``group`` to a prompt of ``prompt`` tokens, as a policy before training."""
    draw = random.Random(seed)
    return [
        train_sample(
            sample_id=index,
            group_id=index // group,
            token_ids=tuple(draw.randrange(vocab_size) for _ in range(length)),
            loss_mask=(0,) * prompt + (1,) * (length - prompt),
            rollout_logprobs=(0.0,) * prompt + (-12.0,) * (length - prompt),
            reward=float(index % 2),
            scalar_advantage=draw.uniform(-1, 1),
        )
        for index, length in enumerate(lengths)
    ]


def batch_of(samples: Sequence[TrainSample]) -> TrainBatch:
    """These samples end to end, under their own ids."""
    advantages = [sample.scalar_advantage for sample in samples if sample.scalar_advantage is not None]
    batch = TrainBatch.of_lengths(
        [len(sample) for sample in samples],
        sample_ids=[sample.sample_id for sample in samples],
        group_ids=[sample.group_id for sample in samples],
        rewards=[sample.reward for sample in samples],
        scalar_advantages=advantages if advantages else None,
        weight_versions=[sample.weight_version for sample in samples],
    )
    for row, sample in zip(batch, samples, strict=True):
        row.token_ids[:], row.loss_mask[:], row.rollout_logprobs[:] = sample.token_ids, sample.loss_mask, sample.rollout_logprobs
    return replace(batch, images=ImageArrays.of([sample.images for sample in samples]))


def part_for(samples: Sequence[TrainSample], plan: BatchPlan, dp_rank: int = 0) -> BatchPart:
    """What a data-parallel rank gets of these samples."""
    return part_of(batch_of(samples), plan, dp_rank)
