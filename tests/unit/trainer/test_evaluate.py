"""What evaluation reports; pass@k against counting every subset."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from rlx.driver.evaluate import at_k, pass_chance, summarise
from rlx.types.rollout import (
    Completion,
    Prompt,
    Reward,
    RolloutGroup,
)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_chance_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([1] * right + [0] * (n - right), k))
            assert pass_chance(n, right, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_at_k_leaves_out_what_is_too_short() -> None:
    found = at_k([[1.0, 0.0, 0.4], [0.0, 0.0, 0.0], [1.0], []], 3, pass_reward=1.0)
    assert found["mean@3"] == pytest.approx((1.4 / 3 + 0 + 1) / 3)
    assert found["pass@1"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert found["pass@2"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["pass@3"] == pytest.approx(1 / 2)


def group(*rewards: Reward) -> RolloutGroup:
    answer = Completion(token_ids=(5, 6, 7), rollout_logprobs=(-1.0,) * 3, finish_reason="stop", weight_versions=(1,) * 3)
    prompt = Prompt(prompt_id=0, token_ids=(1,), text="?")
    return RolloutGroup(prompt=prompt, completions=(answer,) * len(rewards), rewards=rewards)


def test_answers_that_cannot_be_judged_are_counted_and_not_averaged() -> None:
    right, wrong, broken = Reward(value=1.0), Reward(value=0.0), Reward(value=9.0, valid=False, error="?")
    found = summarise([group(right, broken), group(wrong, wrong), group(broken, broken)], 2, pass_reward=1.0)
    assert found["eval/reward_mean"] == pytest.approx(1 / 3)
    assert found["eval/mean@2"] == pytest.approx((1.0 + 0.0) / 2)
    assert (found["eval/invalid"], found["eval/tokens_mean"]) == (3.0, 3.0)


def test_an_evaluation_without_any_verdict_says_so_instead_of_failing() -> None:
    broken = Reward(value=0.0, valid=False, error="?")
    assert summarise([group(broken, broken)], 2, pass_reward=1.0) == {
        "eval/tokens_mean": 3.0,
        "eval/cut_off_share": 0.0,
        "eval/invalid": 2.0,
        "eval/prompts": 1.0,
    }


def test_parts_of_the_reward_and_answers_that_were_cut_off() -> None:
    cut = Completion(token_ids=(5,), rollout_logprobs=(-1.0,), finish_reason="length", weight_versions=(1,))
    scored = group(Reward(value=1.0, parts={"right": 1.0, "form": 0.5}), Reward(value=0.0, parts={"right": 0.0, "mean": 7.0}))
    found = summarise([replace(scored, completions=(scored.completions[0], cut))], 2, pass_reward=1.0, prefix="eval/a")
    assert (found["eval/a/reward_right"], found["eval/a/reward_form"], found["eval/a/cut_off_share"]) == (0.5, 0.5, 0.5)
    # A part that is called like the whole does not stand in for it.
    assert found["eval/a/reward_mean"] == 0.5
