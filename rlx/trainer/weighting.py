"""What each response token counts for: aggregation, sequence means, and the correction for the engine's drift.

Runs on the last pipeline stage; the columns it adds are position-aligned like all others.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlx.algos.aggregation import loss_divisor, token_weight
from rlx.algos.mismatch import drift, importance_weights
from rlx.config.schema import AlgorithmConfig
from rlx.parallel.schedule import Divisors
from rlx.trainer.batch import RankBatch, of_sample, position_mask, position_rollout_logprobs

Stats = dict[str, Tensor]


def add_weights(batch: RankBatch, aggregation: str) -> None:
    """The columns ``weights`` (by ``aggregation``), ``sequence_weights`` (1 / tokens) and ``outcomes`` (the reward)."""
    masks = {sample.sample_id: position_mask(sample) for sample in batch.samples}

    def weights(mode: str) -> dict[int, Tensor]:
        return {
            sample.sample_id: masks[sample.sample_id] * token_weight(mode, sample.num_loss_tokens) for sample in batch.samples
        }

    batch.columns = replace(
        batch.columns,
        weights=weights(aggregation),
        sequence_weights=weights("seq-mean-token-mean"),
        outcomes={sample.sample_id: masks[sample.sample_id] * sample.reward for sample in batch.samples},
    )


def divisors(batch: RankBatch, mini_batch: int, aggregation: str, constant: int) -> Divisors:
    """The mini-batch's, the same on every rank. ``constant``: tokens a sequence, of the aggregation of that name."""
    counts = batch.counts(mini_batch)
    loss = loss_divisor(aggregation, counts.num_loss_tokens, counts.num_sequences, constant)
    return Divisors(loss=loss, loss_tokens=float(max(1, counts.num_loss_tokens)))


def add_importance(batch: RankBatch, algorithm: AlgorithmConfig) -> Stats:
    """Drift statistics under ``mismatch/...``; the column ``importance`` where a correction is asked for."""
    corrects = algorithm.mismatch_correction != "none" or algorithm.mismatch_reject_low > 0
    corrects = corrects or algorithm.mismatch_reject_high is not None

    def look(old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Stats]:
        weights, more = importance_weights(old, rollout, mask, algorithm)
        return weights, drift(old, rollout, mask) | (more if corrects else {})

    # A rank without samples must know the names too.
    stats = look(*(torch.zeros(0) for _ in range(3)))[1]
    column: dict[int, Tensor] = {}
    for sample in batch.samples:
        old = of_sample(batch.columns.old_logprobs, sample)
        column[sample.sample_id], found = look(old, position_rollout_logprobs(sample), position_mask(sample))
        stats = {name: stats[name] + stat for name, stat in found.items()}
    if corrects:
        batch.columns = replace(batch.columns, importance=column)
    return {f"mismatch/{name}": stat for name, stat in stats.items()}
