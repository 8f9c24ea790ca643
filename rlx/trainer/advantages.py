"""From rewards to advantages and returns, for the samples of one data-parallel rank, on its last pipeline stage.

``sums`` adds a float64 tensor up over the data-parallel ranks; every rank must come here, also one without samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlx.algos.base import Algorithm
from rlx.algos.gae import gae_ragged
from rlx.algos.kl import kl_estimate
from rlx.algos.ppo import token_rewards
from rlx.algos.prime import process_advantages, process_baselines
from rlx.algos.whitening import whiten
from rlx.config.schema import AlgorithmConfig
from rlx.trainer.batch import RankBatch, of_sample, position_mask

Sums = Callable[[Tensor], Tensor]


def add_advantages(batch: RankBatch, algorithm: Algorithm, config: AlgorithmConfig, kl_coefficient: float, sums: Sums) -> None:
    """The column ``advantages`` (and ``returns`` with a critic), whitened over all response tokens if asked for."""
    if algorithm.kind == "group":
        advantages = _from_groups(batch, algorithm, config, kl_coefficient, sums)
    elif algorithm.kind == "process":
        advantages = _from_process(batch, config, sums)
    else:
        advantages = _from_token_rewards(batch, algorithm, config, kl_coefficient)
    if config.whiten_advantages:
        advantages = _whitened(advantages, [position_mask(sample) for sample in batch.samples], sums)
    batch.columns = replace(batch.columns, advantages=_by_id(batch, advantages))


def _from_groups(
    batch: RankBatch, algorithm: Algorithm, config: AlgorithmConfig, kl_coefficient: float, sums: Sums
) -> list[Tensor]:
    """Each sample's scalar advantage at its response positions.

    A KL in the reward enters here and not on the driver, which has no log-probs: the advantage must be linear in the
    rewards, so that the group's KLs can be turned into advantages on their own and added.
    """
    scalars = {sample.sample_id: sample.scalar_advantage or 0.0 for sample in batch.samples}
    if config.kl_placement == "reward":
        assert algorithm.group_advantages is not None
        kls = _over_all_samples(batch, {id: float(kl.sum()) for id, kl in _kls(batch, config).items()}, sums)
        for members in _groups(batch):
            parts = algorithm.group_advantages([-kl_coefficient * kls[index] for index in members], [True] * len(members), None)
            for index, part in zip(members, parts, strict=True):
                if index in scalars:
                    scalars[index] += part
    return [position_mask(sample) * scalars[sample.sample_id] for sample in batch.samples]


def _from_token_rewards(batch: RankBatch, algorithm: Algorithm, config: AlgorithmConfig, kl_coefficient: float) -> list[Tensor]:
    """GAE on token rewards: with the critic's values, or plain returns without one."""
    samples = batch.samples
    masks = [position_mask(sample) for sample in samples]
    kls = _kls(batch, config) if config.kl_placement == "reward" else {}
    rewards = [
        token_rewards(sample.reward, mask, kls.get(sample.sample_id), kl_coefficient)
        for sample, mask in zip(samples, masks, strict=True)
    ]
    if algorithm.kind == "returns":
        return gae_ragged(rewards, [torch.zeros_like(mask) for mask in masks], masks, config.gamma, 1.0)[0]
    values = [of_sample(batch.columns.values, sample) for sample in samples]
    advantages, returns = gae_ragged(rewards, values, masks, config.gamma, config.lam)
    batch.columns = replace(batch.columns, returns=_by_id(batch, returns))
    return advantages


def _from_process(batch: RankBatch, config: AlgorithmConfig, sums: Sums) -> list[Tensor]:
    """PRIME: the group's outcomes (on the driver) and the process rewards of the second model."""
    samples, columns = batch.samples, batch.columns
    masks = [position_mask(sample) for sample in samples]
    rewards = [
        config.prime_beta * (of_sample(columns.process_logprobs, sample) - of_sample(columns.ref_logprobs, sample)) * mask
        for sample, mask in zip(samples, masks, strict=True)
    ]
    own = {s.sample_id: float(r.sum()) / max(1, s.num_loss_tokens) for s, r in zip(samples, rewards, strict=True)}
    means = _over_all_samples(batch, own, sums)
    baselines: dict[int, float] = {}
    for members in _groups(batch):
        baselines |= dict(zip(members, process_baselines([means[index] for index in members]), strict=True))
    chosen = [baselines[sample.sample_id] for sample in samples]
    return process_advantages(rewards, masks, chosen, [sample.scalar_advantage or 0.0 for sample in samples], config.gamma)


def _kls(batch: RankBatch, config: AlgorithmConfig) -> dict[int, Tensor]:
    """The KL estimate at each response position of each sample, by sample id."""
    old, ref = batch.columns.old_logprobs, batch.columns.ref_logprobs
    return {
        sample.sample_id: kl_estimate(of_sample(old, sample), of_sample(ref, sample), config.kl_estimator) * position_mask(sample)
        for sample in batch.samples
    }


def _over_all_samples(batch: RankBatch, own: dict[int, float], sums: Sums) -> list[float]:
    """One number a sample, known to the rank that has the sample, for all samples of the batch on every rank."""
    table = torch.zeros(len(batch.group_ids), dtype=torch.float64)
    for index, value in own.items():
        table[index] = value
    return [float(value) for value in sums(table)]


def _groups(batch: RankBatch) -> list[list[int]]:
    """Sample ids of each group, over all ranks."""
    groups: dict[int, list[int]] = defaultdict(list)
    for sample_id, group_id in enumerate(batch.group_ids):
        groups[group_id].append(sample_id)
    return list(groups.values())


def _whitened(advantages: Sequence[Tensor], masks: Sequence[Tensor], sums: Sums) -> list[Tensor]:
    empty = [torch.zeros(0)]
    whitened = whiten(torch.cat([*advantages, *empty]), torch.cat([*masks, *empty]), sums)
    return list(whitened.split([mask.numel() for mask in masks])) if masks else []


def _by_id(batch: RankBatch, values: Sequence[Tensor]) -> dict[int, Tensor]:
    return {sample.sample_id: value for sample, value in zip(batch.samples, values, strict=True)}
