"""From scored rollout groups to training samples; whatever cannot be trained on is dropped with a counted reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlx.types.rollout import (
    Completion,
    Prompt,
    Reward,
    RolloutGroup,
    TrainSample,
)


def to_train_samples(
    groups: Sequence[RolloutGroup], advantages: Sequence[Sequence[float]] | None = None
) -> tuple[list[TrainSample], Counter[str]]:
    """One sample for each usable completion, in order, and the number of drops by reason.

    ``advantages[g][i]`` is the scalar advantage of completion i of group g (None: a critic supplies them). Sample ids
    are the running index of the kept samples; group ids are the prompt ids. Reasons: ``aborted`` (the engine gave up),
    ``empty_response``, ``invalid_reward`` (the verifier failed). Raises ValueError on unscored groups or lengths that
    do not fit.
    """
    if advantages is not None and len(advantages) != len(groups):
        raise ValueError(f"{len(groups)} groups but advantages for {len(advantages)}")
    samples: list[TrainSample] = []
    drops: Counter[str] = Counter()
    for group_index, group in enumerate(groups):
        rewards = _checked_rewards(group)
        of_group = None if advantages is None else advantages[group_index]
        if of_group is not None and len(of_group) != len(group.completions):
            raise ValueError(f"prompt {group.prompt.prompt_id}: {len(group.completions)} answers, {len(of_group)} advantages")
        for index, (completion, reward) in enumerate(zip(group.completions, rewards, strict=True)):
            reason = _drop_reason(completion, reward)
            if reason is not None:
                drops[reason] += 1
                continue
            advantage = None if of_group is None else float(of_group[index])
            samples.append(_to_sample(len(samples), group.prompt, completion, reward, advantage))
    return samples, drops


def _checked_rewards(group: RolloutGroup) -> tuple[Reward, ...]:
    if group.rewards is None:
        raise ValueError(f"prompt {group.prompt.prompt_id} has not been scored: its rewards are None")
    if len(group.rewards) != len(group.completions):
        raise ValueError(f"prompt {group.prompt.prompt_id}: {len(group.completions)} answers, {len(group.rewards)} rewards")
    return group.rewards


def _drop_reason(completion: Completion, reward: Reward) -> str | None:
    if completion.finish_reason == "abort":
        return "aborted"
    if not completion.token_ids:
        return "empty_response"
    return None if reward.valid else "invalid_reward"


def _to_sample(sample_id: int, prompt: Prompt, completion: Completion, reward: Reward, advantage: float | None) -> TrainSample:
    num_prompt, num_response = len(prompt.token_ids), len(completion.token_ids)
    if num_prompt == 0:
        raise ValueError(f"prompt {prompt.prompt_id} has no tokens: nothing predicts the first response token")
    if len(completion.rollout_logprobs) != num_response:
        raise ValueError(
            f"prompt {prompt.prompt_id}: {num_response} response tokens but {len(completion.rollout_logprobs)} log-probs"
        )
    return TrainSample(
        sample_id=sample_id,
        group_id=prompt.prompt_id,
        token_ids=prompt.token_ids + completion.token_ids,
        loss_mask=(0,) * num_prompt + (1,) * num_response,
        rollout_logprobs=(0.0,) * num_prompt + completion.rollout_logprobs,
        reward=reward.value,
        scalar_advantage=advantage,
        # The oldest weights that wrote a token: staleness is judged by the worst case.
        weight_version=min(completion.weight_versions, default=0),
    )
