"""Trajectories: views over segments, turns, and several turns all the way to a loss."""

from __future__ import annotations

import pickle
from array import array
from dataclasses import replace

import pytest
import torch

from rlx.algos.gae import gae_ragged
from rlx.algos.ppo import token_rewards
from rlx.algos.registry import make_algorithm
from rlx.config.schema import AlgorithmConfig
from rlx.data.collate import collate
from rlx.data.plan import plan_batch
from rlx.data.samples import to_train_batch
from rlx.types.batch import LossInputs
from rlx.types.layout import ParallelDims
from rlx.types.rollout import NO_VERSION, ImageSpan, Prompt, Reward, RolloutGroup, Segment, Trajectory, given, sampled
from tests.trajectories import answered, conversation

PROMPT = (50, 51, 52)
# Asked, answered, a tool's word, answered, a last word that nobody answers.
TURNS = conversation(PROMPT, (1, 2), (60, 61, 62), (3,), (63, 64))


def test_a_single_turn_is_two_segments() -> None:
    one = Trajectory(segments=(given((1, 2)), *sampled((7, 8), (-0.5, -0.1), (3, 3))), finish_reason="stop")
    assert len(one.segments) == 2 and [segment.is_sampled for segment in one.segments] == [False, True]
    assert one.token_ids == array("i", (1, 2, 7, 8)) and one.loss_mask == array("b", (0, 0, 1, 1))
    assert one.rollout_logprobs == array("d", (0.0, 0.0, -0.5, -0.1))
    assert one.weight_versions == array("i", (NO_VERSION, NO_VERSION, 3, 3))
    assert one.turns == (array("i", (7, 8)),) and (one.num_sampled, one.oldest_version) == (2, 3)
    assert one.images == () and not one.is_cut_off and replace(one, finish_reason="length").is_cut_off
    span = ImageSpan(key="ab" * 32, start=0, grid=(1, 2, 4))
    assert replace(one, images=(span,)) != one


def test_an_answer_that_went_on_under_new_weights_is_one_turn() -> None:
    one = answered((1,), (7, 8, 9), versions=(5, 5, 3))
    assert [segment.weight_version for segment in one.segments] == [None, 5, 3]
    assert one.turns == (array("i", (7, 8, 9)),) and one.oldest_version == 3
    assert list(one.weight_versions) == [NO_VERSION, 5, 5, 3]


def test_without_a_sampled_token_there_is_no_turn() -> None:
    for empty in (answered((1,), ()), conversation((1,), (), (2,))):
        assert empty.turns == () and (empty.num_sampled, empty.oldest_version) == (0, 0)


def test_several_turns() -> None:
    assert list(TURNS.token_ids) == [50, 51, 52, 1, 2, 60, 61, 62, 3, 63, 64]
    assert list(TURNS.loss_mask) == [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0]
    assert list(TURNS.rollout_logprobs) == [0, 0, 0, -0.5, -1.0, 0, 0, 0, -1.5, 0, 0]
    assert [version for version in TURNS.weight_versions if version != NO_VERSION] == [1, 1, 2]
    assert [list(turn) for turn in TURNS.turns] == [[1, 2], [3]] and TURNS.num_sampled == 3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 sampled tokens but 1 log-probs"):
        Segment(token_ids=array("i", (1, 2)), rollout_logprobs=array("d", (-1.0,)), weight_version=0)
    with pytest.raises(ValueError, match="2 given tokens but 2 log-probs"):
        Segment(token_ids=array("i", (1, 2)), rollout_logprobs=array("d", (-1.0, -1.0)))
    with pytest.raises(ValueError, match="lengths 2, 1, 2"):
        sampled((1, 2), (-1.0,), (0, 0))


def test_they_travel_and_stay_small() -> None:
    one = answered(range(1000), range(4000), logprobs=[-1.0 / (n + 3) for n in range(4000)])
    packed = pickle.dumps(one)
    assert pickle.loads(packed) == one and len(packed) < 1000 * 4 + 4000 * 12 + 1000


def test_several_turns_reach_a_loss_at_the_sampled_tokens_alone() -> None:
    """Whatever comes last: here a given segment, in the other sample a sampled one."""
    prompt = Prompt(prompt_id=7, token_ids=PROMPT, text="?")
    rewards = (Reward(value=2.0), Reward(value=-1.0))
    group = RolloutGroup(prompt=prompt, trajectories=(TURNS, answered(PROMPT, (4, 5))), rewards=rewards)
    batch, drops = to_train_batch([group])
    samples = list(batch.rows(range(len(batch))))
    assert not drops and [sample.num_loss_tokens for sample in samples] == [3, 2]
    assert [sample.weight_version for sample in samples] == [1, 0]
    dims = ParallelDims(world_size=1)
    lengths, counts = [len(s.token_ids) for s in samples], [s.num_loss_tokens for s in samples]
    (part,) = plan_batch(lengths, counts, dims=dims, num_mini_batches=1, max_tokens=64).mini_batches
    assert part.num_loss_tokens == 5
    pack = collate(samples, part.micro_batches[0][0], dims)
    at = pack.loss_mask_T.nonzero()[:, 0]
    assert pack.labels_T[at].tolist() == [1, 2, 3, 4, 5]

    masks = list(pack.loss_mask_T.split(lengths))
    earned = [token_rewards(sample.reward, mask) for sample, mask in zip(samples, masks, strict=True)]
    assert [step.nonzero().tolist() for step in earned] == [[[7]], [[3]]], "the verdict stands at the last sampled token"
    advantages, _ = gae_ragged(earned, [torch.zeros_like(mask) for mask in masks], masks, 1.0, 1.0)
    advantages_T = torch.cat(advantages)
    assert advantages_T[at].tolist() == [2.0, 2.0, 2.0, -1.0, -1.0] and advantages_T.abs().sum() == 8
    logprobs_T = torch.full_like(pack.loss_mask_T, -0.7).requires_grad_()
    old_T = torch.full_like(pack.loss_mask_T, -0.7)
    loss = make_algorithm(AlgorithmConfig(name="ppo")).policy_loss(
        LossInputs(weights_T=pack.loss_mask_T, logprobs_T=logprobs_T, old_logprobs_T=old_T, advantages_T=advantages_T)
    )
    loss.loss.backward()
    assert logprobs_T.grad is not None and torch.equal(logprobs_T.grad, -advantages_T)
