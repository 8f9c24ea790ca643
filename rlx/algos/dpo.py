"""Direct preference optimisation: a policy learns from pairs of answers without a reward model.

With d = log(policy / reference) of an answer and h = d(chosen) - d(rejected):

    DPO   -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)     (Rafailov et al. 2023, equation 7; with label smoothing e
                                                                     the conservative form of Mitchell 2023)
    IPO   (h - 1 / (2 beta))^2, d averaged over the answer's tokens (Azar et al. 2023, equation 17; the average is the
                                                                     authors' later advice, and what TRL computes)

``weights_T`` mark the answers' tokens; see ``pairs``. Scores are beta d, the implicit rewards.
Shape legend: T packed tokens of this rank, P pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rlx.algos.pairs import pair_loss, pair_scores
from rlx.algos.policy_loss import needed
from rlx.types.batch import LossInputs, LossOutput


def dpo_loss(inputs: LossInputs, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """DPO's loss [sum over pairs, weighted]; ``label_smoothing`` is the share of pairs taken to be the wrong way round."""
    rewards_P2 = beta * pair_scores(_log_ratios(inputs), inputs)
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    loss_P = -(1 - label_smoothing) * F.logsigmoid(margins_P) - label_smoothing * F.logsigmoid(-margins_P)
    return pair_loss(loss_P, rewards_P2, inputs)


def ipo_loss(inputs: LossInputs, beta: float) -> LossOutput:
    """IPO's loss [sum over pairs, weighted]; ``beta`` is the paper's tau."""
    ratios_P2 = pair_scores(_log_ratios(inputs), inputs, mean=True)
    loss_P = (ratios_P2[:, 0] - ratios_P2[:, 1] - 1 / (2 * beta)).square()
    return pair_loss(loss_P, beta * ratios_P2, inputs)


def _log_ratios(inputs: LossInputs) -> Tensor:
    keep_T = inputs.weights_T != 0
    return needed(inputs.logprobs_T, "logprobs_T", keep_T) - needed(inputs.ref_logprobs_T, "ref_logprobs_T", keep_T)
