"""Supervised fine-tuning: the negative log-likelihood of given answers. Shape legend: T packed tokens."""

from __future__ import annotations

from rlx.algos.policy_loss import needed
from rlx.algos.stats import sum_and_count
from rlx.types.batch import LossInputs, LossOutput


def sft_loss(inputs: LossInputs) -> LossOutput:
    """sum of w * -log p(token). Statistics, over the tokens whose weight is not 0: ``loss``, ``entropy`` where given."""
    keep_T = inputs.weights_T != 0
    loss_T = -needed(inputs.logprobs_T, "logprobs_T", keep_T)
    stats = {"loss": sum_and_count(loss_T, keep_T)}
    if inputs.entropy_T is not None:
        stats["entropy"] = sum_and_count(inputs.entropy_T, keep_T)
    return LossOutput(loss=(inputs.weights_T * loss_T).sum(), stats=stats)
