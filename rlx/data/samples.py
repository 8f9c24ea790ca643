"""From scored rollout groups to training samples; whatever cannot be trained on is dropped with a counted reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from rlx.types.rollout import (
    Reward,
    RolloutGroup,
    TrainSample,
    Trajectory,
)

AnswerFilter = tuple[str, Callable[[Trajectory, Reward], bool]]
"""(reason, whether an answer with this verdict is dropped for it)."""

UNTRAINABLE: tuple[AnswerFilter, ...] = (
    ("aborted", lambda trajectory, reward: trajectory.finish_reason == "abort"),  # the engine gave up
    ("empty_response", lambda trajectory, reward: not trajectory.num_sampled),
    ("invalid_reward", lambda trajectory, reward: not reward.valid),  # the verifier failed
)


def to_train_samples(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float]] | None = None,
    filters: Sequence[AnswerFilter] = UNTRAINABLE,
) -> tuple[list[TrainSample], Counter[str]]:
    """One sample for each usable trajectory, in order, and the number of drops by reason: the first filter's that drops it.

    ``advantages[g][i]`` is the scalar advantage of trajectory i of group g (None: a critic supplies them). Sample ids
    are the running index of the kept samples; group ids are the prompt ids. Raises ValueError on unscored groups or lengths
    that do not fit.
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
            reason = next((reason for reason, drops_it in filters if drops_it(trajectory, reward)), None)
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
