"""From scored rollout groups to training samples; whatever cannot be trained on is dropped with a counted reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlx.types.rollout import (
    Reward,
    RolloutGroup,
    TrainSample,
    Trajectory,
)


def to_train_samples(
    groups: Sequence[RolloutGroup], advantages: Sequence[Sequence[float]] | None = None
) -> tuple[list[TrainSample], Counter[str]]:
    """One sample for each usable trajectory, in order, and the number of drops by reason.

    ``advantages[g][i]`` is the scalar advantage of trajectory i of group g (None: a critic supplies them). Sample ids
    are the running index of the kept samples; group ids are the prompt ids. Reasons: ``aborted`` (the engine gave up),
    ``empty_response`` (nothing was sampled), ``invalid_reward`` (the verifier failed). Raises ValueError on unscored groups or
    lengths that do not fit.
    """
    if advantages is not None and len(advantages) != len(groups):
        raise ValueError(f"{len(groups)} groups but advantages for {len(advantages)}")
    samples: list[TrainSample] = []
    drops: Counter[str] = Counter()
    for group_index, group in enumerate(groups):
        rewards = _checked_rewards(group)
        of_group = None if advantages is None else advantages[group_index]
        if of_group is not None and len(of_group) != len(group.trajectories):
            raise ValueError(f"prompt {group.prompt.prompt_id}: {len(group.trajectories)} answers, {len(of_group)} advantages")
        for index, (trajectory, reward) in enumerate(zip(group.trajectories, rewards, strict=True)):
            reason = _drop_reason(trajectory, reward)
            if reason is not None:
                drops[reason] += 1
                continue
            advantage = None if of_group is None else float(of_group[index])
            samples.append(_to_sample(len(samples), group.prompt.prompt_id, trajectory, reward.value, advantage))
    return samples, drops


def _checked_rewards(group: RolloutGroup) -> tuple[Reward, ...]:
    if group.rewards is None:
        raise ValueError(f"prompt {group.prompt.prompt_id} has not been scored: its rewards are None")
    if len(group.rewards) != len(group.trajectories):
        raise ValueError(f"prompt {group.prompt.prompt_id}: {len(group.trajectories)} answers, {len(group.rewards)} rewards")
    return group.rewards


def _drop_reason(trajectory: Trajectory, reward: Reward) -> str | None:
    if trajectory.finish_reason == "abort":
        return "aborted"
    if not trajectory.num_sampled:
        return "empty_response"
    return None if reward.valid else "invalid_reward"


def _to_sample(sample_id: int, group_id: int, trajectory: Trajectory, reward: float, advantage: float | None) -> TrainSample:
    loss_mask = trajectory.loss_mask
    if loss_mask[0]:
        raise ValueError(f"prompt {group_id} has no tokens: nothing predicts the first sampled token")
    return TrainSample(
        sample_id=sample_id,
        group_id=group_id,
        token_ids=trajectory.token_ids,
        loss_mask=loss_mask,
        rollout_logprobs=trajectory.rollout_logprobs,
        reward=reward,
        scalar_advantage=advantage,
        weight_version=trajectory.oldest_version,
    )
