"""Log-probs of tokens: the reference's of a batch, any model's of given sequences (the canary of a sync, ``rlx score``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlx.data.plan import part_of, plan_batch
from rlx.trainer.batch import RankBatch
from rlx.trainer.rank_model import RankModel
from rlx.types.image_arrays import ImageArrays
from rlx.types.layout import BatchPlan
from rlx.types.rollout import ImageSpan
from rlx.types.train_batch import TrainBatch


def add_ref_logprobs(batch: RankBatch, reference: RankModel) -> None:
    """The column ``ref_logprobs``, on the last pipeline stage. Collective."""
    outputs = reference.score(batch.all_packs())
    if reference.context.is_last_stage:
        ref_logprobs = batch.whole((local, out[0]) for local, out in outputs)
        batch.columns = replace(batch.columns, ref_logprobs=ref_logprobs)


def score_sequences(
    model: RankModel, sequences: Sequence[Sequence[int]], max_tokens: int, images: Sequence[Sequence[ImageSpan]] = ()
) -> list[list[float]]:
    """Log-probs of tokens 1..L-1 of each sequence (at least one token each), on every rank. ``images`` of each, empty for none.
    Collective.

    Every data-parallel replica scores all sequences, so that a replica that went astray cannot hide behind another.
    """
    context = model.context
    one_replica = replace(context.dims, world_size=context.dims.world_size // context.dims.dp, ep=1, etp=None)
    lengths = [len(tokens) for tokens in sequences]
    plan = plan_batch(lengths, lengths, dims=one_replica, num_mini_batches=1, max_tokens=max(max_tokens, *lengths))
    part = plan.mini_batches[0]
    everywhere = replace(part, micro_batches=part.micro_batches * context.dims.dp)
    whole = replace(TrainBatch.of_lengths(lengths, group_ids=range(len(lengths))), images=ImageArrays.of(images))
    for sample, tokens in zip(whole, sequences, strict=True):
        sample.token_ids[:] = tokens
        sample.loss_mask[:] = True
    batch = RankBatch(part_of(whole, BatchPlan(mini_batches=(everywhere,)), context.dp_rank), context)
    outputs = model.score(batch.all_packs())
    rows: list[list[float]] | None = None
    if context.is_last_stage:
        logprobs = batch.whole((local, out[0]) for local, out in outputs)
        rows = [logprobs[index][:-1].tolist() for index in range(len(sequences))]
    return next(found for found in context.gather_objects(rows) if found is not None)
