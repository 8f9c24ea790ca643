"""Generalised advantage estimation (Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE").

Convention, position-aligned: position t predicts token t + 1. ``values[t]`` is V(the state before that token) and
``rewards[t]`` is what the token earned. Masked-in positions of a sequence, in order, are its time steps; others
(prompt, padding, text that the model did not write) are stepped over and come out as 0. The value after the last
step is 0, also for answers cut off by the length limit: the answer was scored as it stands, nothing follows it.

Shape legend: T packed tokens, L tokens of one sample, B sequences, M longest response.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gae_ragged(
    rewards: Sequence[Tensor], values: Sequence[Tensor], masks: Sequence[Tensor], gamma: float, lam: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages [L_b] and returns [L_b] (= advantages + values) of many samples, in order; 0 off the masks. See the module's
    convention."""
    if not rewards:
        return [], []
    lengths = [mask.numel() for mask in masks]
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(rewards[0].device)
    advantages_T, returns_T = gae_packed(
        torch.cat(list(rewards)), torch.cat(list(values)), torch.cat(list(masks)), sequence_T, gamma, lam
    )
    return list(torch.split(advantages_T, lengths)), list(torch.split(returns_T, lengths))


@torch.no_grad()
def gae_packed(
    rewards_T: Tensor, values_T: Tensor, mask_T: Tensor, sequence_T: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages [T] and returns [T] of packed sequences.

    ``sequence_T`` (int64, never decreasing) says which sequence a token belongs to. Rewards off the mask are ignored.
    Steps of all sequences are laid into [B, M] and the loop runs over M only, in float64.
    """
    keep_T = mask_T != 0
    sequence = sequence_T[keep_T]
    advantages_T, returns_T = torch.zeros_like(values_T), torch.zeros_like(values_T)
    if sequence.numel() == 0:
        return advantages_T, returns_T
    counts_B = torch.bincount(sequence)
    starts_B = torch.cumsum(counts_B, 0) - counts_B
    step = torch.arange(sequence.numel(), device=sequence.device) - starts_B[sequence]

    rewards_BM = torch.zeros(counts_B.numel(), int(counts_B.max()), dtype=torch.float64, device=values_T.device)
    values_BM = torch.zeros_like(rewards_BM)
    rewards_BM[sequence, step] = rewards_T[keep_T].double()
    values_BM[sequence, step] = values_T[keep_T].double()
    advantages_BM = _backward_sweep(rewards_BM, values_BM, gamma, lam)

    advantages_T[keep_T] = advantages_BM[sequence, step].to(values_T.dtype)
    returns_T[keep_T] = (advantages_BM + values_BM)[sequence, step].to(values_T.dtype)
    return advantages_T, returns_T


def _backward_sweep(rewards_BM: Tensor, values_BM: Tensor, gamma: float, lam: float) -> Tensor:
    """Steps past a sequence's end hold reward 0 and value 0, which is exactly the bootstrap wanted at its last step."""
    advantages_BM = torch.empty_like(rewards_BM)
    advantage_B = next_value_B = torch.zeros_like(rewards_BM[:, 0])
    for step in reversed(range(rewards_BM.shape[1])):
        delta_B = rewards_BM[:, step] + gamma * next_value_B - values_BM[:, step]
        advantage_B = delta_B + gamma * lam * advantage_B
        advantages_BM[:, step] = advantage_B
        next_value_B = values_BM[:, step]
    return advantages_BM
