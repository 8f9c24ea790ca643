"""From scored rollout groups to a training batch; whatever cannot be trained on is dropped with a counted reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlx.types.image_arrays import ImageArrays
from rlx.types.rollout import ImageSpan, Reward, RolloutGroup, Segment, Trajectory
from rlx.types.train_batch import Ints, TrainBatch

AnswerFilter = tuple[str, Callable[[Trajectory, Reward], bool]]
"""(reason, whether an answer with this verdict is dropped for it)."""

UNTRAINABLE: tuple[AnswerFilter, ...] = (
    ("aborted", lambda trajectory, reward: trajectory.finish_reason == "abort"),  # the engine gave up
    ("empty_response", lambda trajectory, reward: not trajectory.num_sampled),
    ("invalid_reward", lambda trajectory, reward: not reward.valid),  # the verifier failed
)


def first_reason(filters: Iterable[tuple[str, Callable[..., bool]]], *judged: object) -> str | None:
    """The reason of the first filter that drops what is judged; None when none does."""
    return next((reason for reason, drops in filters if drops(*judged)), None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutBatch:
    """Usable trajectories, and what is known of each as one number. Their tokens stay where they are until ``rows`` lays some of
    them flat: the driver has no second copy of a batch."""

    trajectories: Sequence[Trajectory]
    lengths: Sequence[int]
    loss_tokens: Sequence[int]
    group_ids: Ints
    rewards: Sequence[float]
    scalar_advantages: Sequence[float] | None

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def images(self) -> list[tuple[ImageSpan, ...]]:
        """Those of each trajectory."""
        return [trajectory.images for trajectory in self.trajectories]

    def rows(self, indices: Sequence[int]) -> TrainBatch:
        """These trajectories, in this order, as samples that are numbered by their places here."""
        chosen = [self.trajectories[index] for index in indices]
        advantages = self.scalar_advantages
        batch = TrainBatch.of_lengths(
            [self.lengths[index] for index in indices],
            sample_ids=indices,
            group_ids=[int(self.group_ids[index]) for index in indices],
            rewards=[self.rewards[index] for index in indices],
            scalar_advantages=None if advantages is None else [advantages[index] for index in indices],
            weight_versions=[trajectory.oldest_version for trajectory in chosen],
        )
        _write(batch, (segment for trajectory in chosen for segment in trajectory.segments))
        images = ImageArrays.of([trajectory.images for trajectory in chosen])
        return batch if images is None else replace(batch, images=images)


def to_train_batch(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Sequence[float]] | None = None,
    filters: Sequence[AnswerFilter] = UNTRAINABLE,
) -> tuple[RolloutBatch, Counter[str]]:
    """One sequence for each usable trajectory, in order, and the number of drops by reason: the first filter's that drops it.

    ``advantages[g][i]`` is the scalar advantage of trajectory i of group g (None: a critic supplies them). Sample ids
    are the running index of the kept ones; group ids are the prompt ids. Raises ValueError on unscored groups or lengths
    that do not fit.
    """
    if advantages is not None and len(advantages) != len(groups):
        raise ValueError(f"{len(groups)} groups but advantages for {len(advantages)}")
    kept: list[tuple[Trajectory, int, float, float]] = []
    drops: Counter[str] = Counter()
    for group_index, group in enumerate(groups):
        rewards = _checked_rewards(group)
        of_group = [0.0] * len(rewards) if advantages is None else advantages[group_index]
        if len(of_group) != len(group.trajectories):
            raise ValueError(f"prompt {group.prompt.prompt_id}: {len(group.trajectories)} answers, {len(of_group)} advantages")
        for trajectory, reward, advantage in zip(group.trajectories, rewards, of_group, strict=True):
            reason = first_reason(filters, trajectory, reward)
            if reason is not None:
                drops[reason] += 1
                continue
            if next((segment.is_sampled for segment in trajectory.segments if len(segment)), True):
                raise ValueError(f"prompt {group.prompt.prompt_id} has no tokens: nothing predicts the first sampled token")
            kept.append((trajectory, group.prompt.prompt_id, reward.value, advantage))
    trajectories, group_ids, values, scalars = zip(*kept, strict=True) if kept else ((), (), (), ())
    batch = RolloutBatch(
        trajectories=trajectories,
        lengths=[trajectory.num_tokens for trajectory in trajectories],
        loss_tokens=[trajectory.num_sampled for trajectory in trajectories],
        group_ids=np.array(group_ids, np.int64),
        rewards=values,
        scalar_advantages=None if advantages is None else scalars,
    )
    return batch, drops


def _checked_rewards(group: RolloutGroup) -> tuple[Reward, ...]:
    if group.rewards is None:
        raise ValueError(f"prompt {group.prompt.prompt_id} has not been scored: its rewards are None")
    if len(group.rewards) != len(group.trajectories):
        raise ValueError(f"prompt {group.prompt.prompt_id}: {len(group.trajectories)} answers, {len(group.rewards)} rewards")
    return group.rewards


def _write(batch: TrainBatch, segments: Iterable[Segment]) -> None:
    """Write the segments end to end into the batch's columns, which are zeros, without a Python object a token."""
    start = 0
    for segment in segments:
        end = start + len(segment.token_ids)
        batch.token_ids[start:end] = segment.token_ids
        if segment.is_sampled:
            batch.loss_mask[start:end] = True
            batch.rollout_logprobs[start:end] = segment.rollout_logprobs
        start = end
