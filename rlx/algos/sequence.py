"""Sums over whole sequences, also where context parallelism spreads them over ranks.

Shape legend: T packed tokens of this rank, S sequences of the micro-batch.
"""

from __future__ import annotations

from torch import Tensor

from rlx.algos.stats import masked
from rlx.types.batch import LossInputs


def sequence_sums(values_T: Tensor, keep_T: Tensor, inputs: LossInputs) -> Tensor:
    """[S]: ``values_T`` over ``keep_T`` (bool) summed within each sequence over all of its ranks, with gradient.

    Collective where ``inputs.sum_over_ranks`` is. Raises ValueError if the inputs do not say which sequence is which.
    """
    if inputs.sequence_T is None:
        raise ValueError("the loss needs LossInputs.sequence_T, which is None")
    sums_S = values_T.new_zeros(inputs.num_sequences).index_add(0, inputs.sequence_T, masked(values_T, keep_T))
    return sums_S if inputs.sum_over_ranks is None else inputs.sum_over_ranks(sums_S)


def sequence_means(values_T: Tensor, keep_T: Tensor, inputs: LossInputs) -> Tensor:
    """[S]: means where ``sequence_sums`` has sums; 0 for a sequence without tokens."""
    counts_S = sequence_sums(keep_T.to(values_T.dtype), keep_T, inputs)
    return sequence_sums(values_T, keep_T, inputs) / counts_S.clamp(min=1)
