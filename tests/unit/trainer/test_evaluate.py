"""What evaluation reports; pass@k against counting every subset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from rlx.config.schema import DataConfig, EvaluationConfig
from rlx.config.sources import EvaluationSetConfig
from rlx.driver.evaluate import Evaluation, at_k, evaluation_sets, pass_chance, summarise
from rlx.obs.log import logger
from rlx.types.rollout import Prompt, Reward, RolloutGroup, SamplingSpec
from tests.trajectories import answered, conversation


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_chance_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([1] * right + [0] * (n - right), k))
            assert pass_chance(n, right, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_at_k_leaves_out_what_is_too_short() -> None:
    values = [[1.0, 0.0, 0.4], [0.0, 0.0, 0.0], [1.0], []]
    found = at_k([[Reward(value=value) for value in of_prompt] for of_prompt in values], 3, pass_reward=1.0)
    assert found["mean@3"] == pytest.approx((1.4 / 3 + 0 + 1) / 3)
    assert found["pass@1"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert found["pass@2"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["pass@3"] == pytest.approx(1 / 2)


def group(*rewards: Reward) -> RolloutGroup:
    prompt = Prompt(prompt_id=0, token_ids=(1,), text="?")
    return RolloutGroup(prompt=prompt, trajectories=(answered((1,), (5, 6, 7)),) * len(rewards), rewards=rewards)


def test_answers_that_cannot_be_judged_count_as_wrong() -> None:
    """20 of 32, as a verifier that needs a network may do without one."""
    right, wrong, broken = Reward(value=1.0), Reward(value=0.0), Reward(value=9.0, valid=False, error="?")
    groups = [group(right, right, right, broken)] * 4 + [group(*[broken] * 4)] * 4
    found = summarise(groups, 4, pass_reward=1.0)
    assert found["eval/invalid"] == 20
    assert found["eval/reward_mean"] == found["eval/mean@4"] == found["eval/pass@1"] == pytest.approx(12 / 32)
    assert found["eval/pass@4"] == 0.5
    # Also where a wrong answer is below 0, and one without a verdict would be better.
    assert summarise([group(wrong, broken)], 2, pass_reward=-1.0)["eval/pass@1"] == 0.5


class Fakes:
    """Prompts answered twice each; the second answer cannot be judged."""

    def begin_step(self, step: int) -> None: ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSpec) -> Iterator[RolloutGroup]:
        yield from (group(Reward(value=1.0), Reward(value=0.0, valid=False, error="OSError: no network")) for _ in prompts)

    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        yield from groups


def test_evaluation_says_what_could_not_be_judged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [Prompt(prompt_id=index, token_ids=(1,), text="?") for index in range(3)]
    monkeypatch.setattr("rlx.driver.evaluate.evaluation_prompts", lambda *arguments: (prompts, {}))
    monkeypatch.setattr(logger, "propagate", True)
    sets = {"held": EvaluationSetConfig(path="held.jsonl", samples_per_prompt=2, temperature=1.0)}
    fakes: Any = Fakes()
    with caplog.at_level("INFO", logger="rlx"):
        found = evaluation_sets(EvaluationConfig(sets=sets), DataConfig(), fakes, SamplingSpec(max_new_tokens=4))
        metrics = Evaluation(found, fakes, fakes, pass_reward=1.0).measure(3)
    what = "the verifier failed on 3 of 6 answers, which count as wrong; the first: OSError: no network"
    assert f"NOTICE warning: evaluation/held: {what}" in [record.getMessage() for record in caplog.records]
    assert metrics["eval/held/pass@1"] == 0.5


def test_an_evaluation_without_any_verdict_says_so_instead_of_failing() -> None:
    broken = Reward(value=0.0, valid=False, error="?")
    found = summarise([group(broken, broken)], 2, pass_reward=1.0)
    assert (found["eval/reward_mean"], found["eval/pass@2"], found["eval/invalid"]) == (0.0, 0.0, 2.0)


def test_parts_of_the_reward_and_answers_that_were_cut_off() -> None:
    cut = answered((1,), (5,), finish_reason="length")
    scored = group(Reward(value=1.0, parts={"right": 1.0, "form": 0.5}), Reward(value=0.0, parts={"right": 0.0, "mean": 7.0}))
    found = summarise([replace(scored, trajectories=(scored.trajectories[0], cut))], 2, pass_reward=1.0, prefix="eval/a")
    assert (found["eval/a/reward_right"], found["eval/a/reward_form"], found["eval/a/cut_off_share"]) == (0.5, 0.5, 0.5)
    # A part that is called like the whole does not stand in for it.
    assert found["eval/a/reward_mean"] == 0.5


def test_tokens_are_those_that_were_sampled() -> None:
    turns = conversation((1, 2, 3), (7, 7), (8, 8, 8), (7,), (9,))
    scored = replace(group(Reward(value=1.0), Reward(value=1.0)), trajectories=(turns, answered((1,), (5,))))
    assert summarise([scored], 2, pass_reward=1.0)["eval/tokens_mean"] == 2.0
