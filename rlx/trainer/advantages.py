"""From rewards to advantages and returns, for the samples of one data-parallel rank, on its last pipeline stage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlx.algos.gae import gae_ragged
from rlx.algos.kl import kl_estimate
from rlx.algos.ppo import token_rewards
from rlx.algos.whitening import whiten
from rlx.config.schema import AlgorithmConfig
from rlx.trainer.batch import RankBatch, position_mask

Sums = Callable[[Tensor], Tensor]


def group_relative(batch: RankBatch) -> None:
    """Spread each sample's scalar advantage over its response positions."""
    batch.columns["advantages"] = {
        sample.sample_id: position_mask(sample) * (sample.scalar_advantage or 0.0) for sample in batch.samples
    }


def from_critic(batch: RankBatch, config: AlgorithmConfig, kl_coefficient: float, sums: Sums) -> None:
    """GAE on rewards and values, whitened over all ranks' response tokens if asked for.

    ``sums`` adds a float64 tensor up over the data-parallel ranks; every rank must come here, also one without samples.
    """
    samples, columns = batch.samples, batch.columns
    masks = [position_mask(sample) for sample in samples]
    rewards = []
    for sample, mask in zip(samples, masks, strict=True):
        kl = None
        if config.kl_placement == "reward":
            old, ref = columns["old_logprobs"][sample.sample_id], columns["ref_logprobs"][sample.sample_id]
            kl = kl_estimate(old, ref, config.kl_estimator)
        rewards.append(token_rewards(sample.reward, mask, kl, kl_coefficient))
    values = [columns["values"][sample.sample_id] for sample in samples]
    advantages, returns = gae_ragged(rewards, values, masks, config.gamma, config.lam)
    if config.whiten_advantages:
        empty = [torch.zeros(0)]
        whitened = whiten(torch.cat([*advantages, *empty]), torch.cat([*masks, *empty]), sums)
        advantages = list(whitened.split([mask.numel() for mask in masks])) if masks else []
    ids = [sample.sample_id for sample in samples]
    columns["advantages"] = dict(zip(ids, advantages, strict=True))
    columns["returns"] = dict(zip(ids, returns, strict=True))
