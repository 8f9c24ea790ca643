"""Flattening of rollout groups: columns, drops with reasons, stable ids."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlx.data.samples import to_train_batch
from rlx.types.rollout import FinishReason, Prompt, Reward, RolloutGroup, Trajectory
from tests.trajectories import answered

PROMPT = (50, 51, 52)


def completion(tokens: Sequence[int], finish: FinishReason = "stop", versions: Sequence[int] | None = None) -> Trajectory:
    logprobs = [-0.5 - token for token in tokens]
    return answered(PROMPT, tokens, finish_reason=finish, logprobs=logprobs, versions=versions or (4,) * len(tokens))


def group(prompt_id: int, answers: Sequence[Trajectory], rewards: Sequence[Reward] | None) -> RolloutGroup:
    prompt = Prompt(prompt_id=prompt_id, token_ids=PROMPT, text="?")
    return RolloutGroup(prompt=prompt, trajectories=tuple(answers), rewards=None if rewards is None else tuple(rewards))


def mixed_groups() -> list[RolloutGroup]:
    right, broken = Reward(value=0.25), Reward(value=0.0, valid=False, error="boom")
    return [
        group(17, [completion([1, 2], versions=[5, 3]), completion([]), completion([3])], [right, right, broken]),
        group(12, [completion([], "abort"), completion([7, 8, 9], "length"), completion([6], "abort")], [right, right, broken]),
    ]


def test_columns_ids_and_drops() -> None:
    batch, drops = to_train_batch(mixed_groups(), [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    samples = batch.rows(range(2))
    assert drops == {"empty_response": 1, "invalid_reward": 1, "aborted": 2}
    assert [sample.sample_id for sample in samples] == [0, 1]
    first, second = samples
    assert list(first.token_ids) == [50, 51, 52, 1, 2] and list(first.loss_mask) == [0, 0, 0, 1, 1]
    assert list(first.rollout_logprobs) == [0, 0, 0, -1.5, -2.5]
    assert (first.group_id, first.reward, first.scalar_advantage, first.weight_version) == (17, 0.25, 0.1, 3)
    assert (second.group_id, second.num_loss_tokens, second.scalar_advantage, second.weight_version) == (12, 3, 0.5, 4)


def test_a_critic_leaves_advantages_open() -> None:
    batch, _ = to_train_batch(mixed_groups())
    assert [sample.scalar_advantage for sample in batch.rows([1, 0])] == [None, None]
    nothing, drops = to_train_batch([])
    assert len(nothing) == nothing.num_tokens == 0 and not drops


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt 3 has not been scored"):
        to_train_batch([group(3, [completion([1])], None)])
    with pytest.raises(ValueError, match="1 answers, 0 rewards"):
        to_train_batch([group(3, [completion([1])], [])])
    with pytest.raises(ValueError, match="2 groups but advantages for 1"):
        to_train_batch(mixed_groups(), [[0.0] * 3])
    with pytest.raises(ValueError, match="3 answers, 2 advantages"):
        to_train_batch(mixed_groups(), [[0.0] * 2, [0.0] * 3])
    with pytest.raises(ValueError, match="prompt 3 has no tokens"):
        to_train_batch([group(3, [answered((), (1, 2))], [Reward(value=1.0)])])
