"""Reward models: a score for each answer such that the preferred one of a pair scores higher.

    -log sigmoid(r(chosen) - r(rejected)) + c (r(chosen) + r(rejected))^2

Bradley and Terry 1952 as in Ouyang et al. 2022, equation 1; the second term keeps scores around 0 (Eisenstein et al. 2023),
as in TRL. Shape legend: T packed tokens of this rank, P pairs.
"""

from __future__ import annotations

import torch.nn.functional as F

from rlx.algos.pairs import pair_loss, pair_scores
from rlx.algos.policy_loss import needed
from rlx.types.batch import LossInputs, LossOutput


def reward_model_loss(inputs: LossInputs, center_coefficient: float = 0.0) -> LossOutput:
    """The loss [sum over pairs, weighted]. A sequence's score is the sum of ``values_T`` where ``weights_T`` is not 0: one
    token of each sequence, its last. See ``pairs`` for the order of sequences and the statistics."""
    scores_P2 = pair_scores(needed(inputs.values_T, "values_T", inputs.weights_T != 0), inputs)
    loss_P = -F.logsigmoid(scores_P2[:, 0] - scores_P2[:, 1])
    if center_coefficient:
        loss_P = loss_P + center_coefficient * scores_P2.sum(dim=1).square()
    return pair_loss(loss_P, scores_P2, inputs)
