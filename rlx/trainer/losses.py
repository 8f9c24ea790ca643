"""The losses of the models on a rank: what a model's head gave and the batch's columns, handed to an algorithm's function."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from rlx.algos.base import LossFunction
from rlx.algos.dpo import dpo_loss, ipo_loss
from rlx.algos.reward_model import reward_model_loss
from rlx.algos.sft import sft_loss
from rlx.config.schema import FinetuneConfig
from rlx.parallel.context_parallel import sum_over_group
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import Loss
from rlx.types.batch import LossInputs, LossOutput


def policy_loss(function: LossFunction, cp: dist.ProcessGroup) -> Loss:
    """Of the policy: ``function`` of its log-probs and every column that a policy loss may look at. ``cp`` is the group that
    shares sequences."""

    def loss(outputs: Tensor, batch: LocalBatch) -> LossOutput:
        columns = batch.pack.columns
        inputs = LossInputs(
            weights_T=_weights(batch, columns.weights),
            importance_T=batch.local(columns.importance),
            logprobs_T=outputs[0],
            entropy_T=outputs[1],
            old_logprobs_T=batch.local(columns.old_logprobs),
            ref_logprobs_T=batch.local(columns.ref_logprobs),
            advantages_T=batch.local(columns.advantages),
        )
        return function(_with_sequences(inputs, batch, cp))

    return loss


def process_loss(function: LossFunction, cp: dist.ProcessGroup) -> Loss:
    """Of a process reward model: ``function`` of its log-probs, the reference's and the outcomes."""

    def loss(outputs: Tensor, batch: LocalBatch) -> LossOutput:
        columns = batch.pack.columns
        inputs = LossInputs(
            weights_T=_weights(batch, columns.sequence_weights),
            logprobs_T=outputs[0],
            ref_logprobs_T=batch.local(columns.ref_logprobs),
            returns_T=batch.local(columns.outcomes),
        )
        return function(_with_sequences(inputs, batch, cp))

    return loss


def value_loss(function: LossFunction) -> Loss:
    """Of a critic: ``function`` of its values, those before the update, and the returns."""

    def loss(outputs: Tensor, batch: LocalBatch) -> LossOutput:
        columns = batch.pack.columns
        inputs = LossInputs(
            weights_T=batch.loss_mask_t,
            values_T=outputs,
            old_values_T=batch.local(columns.values),
            returns_T=batch.local(columns.returns),
        )
        return function(inputs)

    return loss


def finetune_loss(config: FinetuneConfig, cp: dist.ProcessGroup) -> Loss:
    """Of ``finetune.objective``."""

    def answers(outputs: Tensor, batch: LocalBatch) -> LossInputs:
        columns = batch.pack.columns
        return LossInputs(
            weights_T=_weights(batch, columns.weights),
            logprobs_T=outputs[0],
            entropy_T=outputs[1],
            ref_logprobs_T=batch.local(columns.ref_logprobs),
        )

    def supervised(outputs: Tensor, batch: LocalBatch) -> LossOutput:
        return sft_loss(answers(outputs, batch))

    def preferences(outputs: Tensor, batch: LocalBatch) -> LossOutput:
        inputs = _with_sequences(answers(outputs, batch), batch, cp)
        if config.objective == "ipo":
            return ipo_loss(inputs, config.beta)
        return dpo_loss(inputs, config.beta, config.label_smoothing)

    def scores(outputs: Tensor, batch: LocalBatch) -> LossOutput:
        inputs = LossInputs(weights_T=_weights(batch, batch.pack.columns.weights), values_T=outputs)
        return reward_model_loss(_with_sequences(inputs, batch, cp), config.center_coefficient)

    return {"sft": supervised, "rm": scores}.get(config.objective, preferences)


def _weights(batch: LocalBatch, column_T: Tensor | None) -> Tensor:
    weights = batch.local(column_T)
    assert weights is not None, "load_batch adds the weights"
    return weights


def _with_sequences(inputs: LossInputs, batch: LocalBatch, cp: dist.ProcessGroup) -> LossInputs:
    return replace(
        inputs,
        sequence_T=batch.sequence_t,
        num_sequences=len(batch.pack.sample_ids),
        sum_over_ranks=lambda local: sum_over_group(local, cp),
    )
