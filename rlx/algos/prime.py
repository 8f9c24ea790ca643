"""PRIME: process reinforcement through implicit rewards (Cui et al. 2025, "Process reinforcement through implicit rewards").

A second model phi starts as the policy and learns from outcomes alone. With q_t = beta * log(phi / reference) of token t:

    loss of phi   cross-entropy of sigmoid(sum of q over the answer) against the outcome        (equation 5 of the paper)
    A_t           sum over s >= t of gamma^(s - t) * (q_s - mean over the other answers of their mean q)
                  + outcome - mean of the other answers' outcomes                               (leave-one-out, section 3.3)

phi learns from a batch before it scores it. Shape legend: T packed tokens of this rank, S sequences, L tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlx.algos.base import Algorithm
from rlx.algos.gae import gae_ragged
from rlx.algos.policy_loss import needed, ppo_policy_loss
from rlx.algos.rloo import leave_one_out_advantages
from rlx.algos.sequence import sequence_sums
from rlx.algos.stats import sum_and_count
from rlx.config.algorithm import AlgorithmConfig
from rlx.types.batch import LossInputs, LossOutput


def implicit_reward_loss(inputs: LossInputs, beta: float) -> LossOutput:
    """Cross-entropy [sum over sequences] of phi, given its log-probs, the reference's and the outcome in ``returns_T``.

    Each token carries its sequence's loss, so ``weights_T`` should be 1 / tokens of the sequence. Outcomes are cut to
    [0, 1]. Statistics: ``value`` (the loss), ``accuracy`` (outcome predicted right; the border is 1/2).
    """
    keep_T = inputs.weights_T != 0
    phi_T, ref_T = needed(inputs.logprobs_T, "logprobs_T", keep_T), needed(inputs.ref_logprobs_T, "ref_logprobs_T", keep_T)
    outcome_T = needed(inputs.returns_T, "returns_T", keep_T).clamp(0, 1)
    logits_S = beta * sequence_sums(phi_T - ref_T, keep_T, inputs)
    assert inputs.sequence_T is not None
    logits_T = logits_S[inputs.sequence_T]
    loss_T = F.binary_cross_entropy_with_logits(logits_T, outcome_T, reduction="none")
    right_T = (logits_T > 0) == (outcome_T > 0.5)
    weighted_T = inputs.weights_T.detach().double()
    weight = torch.where(keep_T, weighted_T, 0.0).sum()
    stats = {
        "value": torch.stack([(weighted_T * loss_T.detach().double()).sum(), weight]),
        "accuracy": torch.stack([(weighted_T * right_T).sum(), weight]),
        "value_mean": sum_and_count(beta * (phi_T - ref_T), keep_T),
    }
    return LossOutput(loss=(inputs.weights_T * loss_T).sum(), stats=stats)


def process_baselines(mean_rewards: Sequence[float]) -> list[float]:
    """For each answer of a group, the mean of the other answers' mean process rewards; 0 when it is alone."""
    total, others = sum(mean_rewards), len(mean_rewards) - 1
    return [(total - own) / others if others else 0.0 for own in mean_rewards]


def process_advantages(
    rewards: Sequence[Tensor], masks: Sequence[Tensor], baselines: Sequence[float], outcomes: Sequence[float], gamma: float
) -> list[Tensor]:
    """Advantages [L] of samples from their process rewards [L], leave-one-out baselines and outcome advantages."""
    centred = [(reward - baseline) * mask for reward, mask, baseline in zip(rewards, masks, baselines, strict=True)]
    returns, _ = gae_ragged(centred, [torch.zeros_like(reward) for reward in centred], masks, gamma, 1.0)
    return [part + outcome * mask for part, mask, outcome in zip(returns, masks, outcomes, strict=True)]


def make_prime(config: AlgorithmConfig) -> Algorithm:
    """PRIME: PPO's clipped loss; the second model is trained as the critic is, before it scores."""
    return Algorithm(
        kind="process",
        group_advantages=lambda rewards, valid, _: leave_one_out_advantages(rewards, valid),
        critic_first=True,
        policy_loss=lambda inputs: ppo_policy_loss(inputs, config),
        value_loss=lambda inputs: implicit_reward_loss(inputs, config.prime_beta),
    )
