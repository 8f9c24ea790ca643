"""Losses over pairs of sequences, of which the first was preferred to the second.

The sequences of a micro-batch come in pairs, chosen before rejected (``sequence_T`` 0 and 1 are the first pair). A micro-batch
without samples holds one padding sequence, which stands alone and has no weight. Each token carries half of its pair's loss
times its weight, so ``weights_T`` must add up to the same total in every sequence; that holds under context parallelism
too, where every rank has a part of each sequence and knows the scores of the whole.

Shape legend: T packed tokens of this rank, P pairs of the micro-batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlx.algos.sequence import sequence_means, sequence_sums
from rlx.types.batch import LossInputs, LossOutput


def pair_scores(values_T: Tensor, inputs: LossInputs, *, mean: bool = False) -> Tensor:
    """[P, 2]: ``values_T`` of the weighted tokens, summed (or averaged) in the chosen and in the rejected sequence."""
    reduce = sequence_means if mean else sequence_sums
    scores_S = reduce(values_T, inputs.weights_T != 0, inputs)
    return F.pad(scores_S, (0, scores_S.shape[0] % 2)).view(-1, 2)


def pair_loss(loss_P: Tensor, scores_P2: Tensor, inputs: LossInputs) -> LossOutput:
    """The weighted sum of ``loss_P``. Statistics are means over pairs, each pair counting as its weights do:

    loss      of the pair
    accuracy  share of pairs whose chosen side scores higher
    margin    by how much
    chosen, rejected   the scores themselves
    """
    assert inputs.sequence_T is not None, "pair_scores comes first"
    pair_T, keep_T = inputs.sequence_T // 2, inputs.weights_T != 0
    half_T = torch.where(keep_T, inputs.weights_T, 0.0) / 2

    def mean_over_pairs(values_P: Tensor) -> Tensor:
        weights_T = half_T.detach().double()
        return torch.stack([(weights_T * values_P.detach().double()[pair_T]).sum(), weights_T.sum()])

    margins_P = scores_P2[:, 0] - scores_P2[:, 1]
    stats = {
        "loss": mean_over_pairs(loss_P),
        "accuracy": mean_over_pairs(margins_P > 0),
        "margin": mean_over_pairs(margins_P),
        "chosen": mean_over_pairs(scores_P2[:, 0]),
        "rejected": mean_over_pairs(scores_P2[:, 1]),
    }
    return LossOutput(loss=(half_T * loss_P[pair_T]).sum(), stats=stats)
