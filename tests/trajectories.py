"""Made-up trajectories and requests, for tests that need no engine."""

from __future__ import annotations

from collections.abc import Sequence

from rlx.rewards.request import Answer, RewardRequest
from rlx.types.rollout import FinishReason, Prompt, RolloutGroup, Segment, Trajectory, given, sampled


def answered(
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    *,
    finish_reason: FinishReason = "stop",
    logprobs: Sequence[float] | None = None,
    versions: Sequence[int] | None = None,
) -> Trajectory:
    """A single turn."""
    size = len(token_ids)
    segments = sampled(token_ids, logprobs or (-1.0,) * size, (0,) * size if versions is None else versions)
    return Trajectory(segments=(given(prompt_ids), *segments), finish_reason=finish_reason)


def conversation(*parts: Sequence[int], finish_reason: FinishReason = "stop", logprob: float = -0.5) -> Trajectory:
    """Parts that are given and sampled by turns; the n-th sampled one under the weights of version n."""
    segments: list[Segment] = []
    for index, ids in enumerate(parts):
        if index % 2:
            segments += sampled(ids, [logprob * token for token in ids], [(index + 1) // 2] * len(ids))
        else:
            segments.append(given(ids))
    return Trajectory(segments=tuple(segments), finish_reason=finish_reason)


def text_group(prompt: Prompt, *texts: str) -> RolloutGroup:
    """Answers whose ids are those of their characters."""
    return RolloutGroup(prompt=prompt, trajectories=tuple(answered(prompt.token_ids, tuple(map(ord, text))) for text in texts))


def request(prompt: Prompt, response: str, trajectory: Trajectory | None = None, group: tuple[Answer, ...] = ()) -> RewardRequest:
    """What a verifier is asked; the ids are made up unless given."""
    made = answered(prompt.token_ids, (5,)) if trajectory is None else trajectory
    return RewardRequest(prompt=prompt, response=response, trajectory=made, group=group)
