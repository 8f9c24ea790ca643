"""Dynamic sampling, the greedy baseline, length shaping and filtering, on a fake engine and a fake verifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rlx.algos.registry import make_algorithm
from rlx.config.schema import AlgorithmConfig, Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig
from rlx.driver.experience import (
    Rollouts,
    collect,
    has_signal,
    prepare,
)
from rlx.driver.roles import Roles
from rlx.types.rollout import Prompt, Reward, RolloutGroup, SamplingSpec
from tests.trajectories import answered, conversation

SAMPLING = SamplingSpec(num_samples=4, max_new_tokens=10)


def config_of(prompts: int = 8, **algorithm: Any) -> Config:
    return Config(
        model=ModelConfig(path=""),
        data=DataConfig(train="", prompts_per_step=prompts),
        reward=RewardConfig(name="exact"),
        rollout=RolloutConfig(samples_per_prompt=4, max_new_tokens=10),
        algorithm=AlgorithmConfig(**algorithm),
    )


@dataclass
class Fakes:
    """Prompts whose ids are ``useful`` get one right answer of four; the others only wrong ones."""

    useful: set[int]
    asked: list[int] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)

    def next(self, num: int) -> list[Prompt]:
        self.asked.append(num)
        start = sum(self.asked[:-1])
        return [Prompt(prompt_id=start + index, token_ids=(1,), text="") for index in range(num)]

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSpec) -> Iterator[RolloutGroup]:
        self.temperatures.append(sampling.temperature)
        for prompt in reversed(prompts):
            answers = tuple(
                answered((1,), (7,) * (3 * (index + 1)), finish_reason="length" if index == 3 else "stop")
                for index in range(sampling.num_samples)
            )
            yield RolloutGroup(prompt=prompt, trajectories=answers)

    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        for group in groups:
            right = group.prompt.prompt_id in self.useful
            values = [1.0 if right and index == 0 else 0.0 for index in range(len(group.trajectories))]
            yield replace(group, rewards=tuple(Reward(value=value) for value in values))

    @property
    def roles(self) -> Roles:
        return cast(Roles, SimpleNamespace(prompts=self, rollout=self, reward=self))


def test_seventy_percent_without_signal_still_fill_the_batch() -> None:
    fakes = Fakes(useful={index for index in range(1000) if index % 10 < 3})
    config = config_of(prompts=20, name="dapo", dynamic_max_factor=6.0)
    found = collect(config, fakes.roles, make_algorithm(config.algorithm), SAMPLING)
    assert len(found.groups) == 20 and all(has_signal(group) for group in found.groups)
    ids = [group.prompt.prompt_id for group in found.groups]
    assert ids == sorted(ids)
    asked = found.metrics["dynamic/prompts_asked"]
    assert asked == sum(fakes.asked) <= 120
    useful = asked - found.metrics["dynamic/groups_without_signal"]
    assert useful == 20 + found.metrics["dynamic/groups_surplus"]
    assert found.metrics["dynamic/groups_missing"] == 0


def test_without_any_signal_it_stops_at_the_limit() -> None:
    fakes = Fakes(useful=set())
    config = config_of(prompts=8, name="dapo", dynamic_max_factor=2.5)
    found = collect(config, fakes.roles, make_algorithm(config.algorithm), SAMPLING)
    assert sum(fakes.asked) == 20
    assert len(found.groups) == 8 and found.metrics["dynamic/groups_missing"] == 8
    samples = prepare(config, make_algorithm(replace(config.algorithm, overlong_buffer=0.0)), found)
    assert len(samples.kept) == 32


def test_a_short_batch_is_used_as_it_is() -> None:
    fakes = Fakes(useful={3, 5})
    config = config_of(prompts=8, name="grpo", dynamic_sampling=True, dynamic_max_factor=2.0)
    found = collect(config, fakes.roles, make_algorithm(config.algorithm), SAMPLING)
    assert [group.prompt.prompt_id for group in found.groups] == [3, 5]
    assert found.metrics["dynamic/groups_missing"] == 6


def test_remax_compares_with_the_greedy_answer() -> None:
    fakes = Fakes(useful={0})
    config = config_of(prompts=2, name="remax")
    algorithm = make_algorithm(config.algorithm)
    found = collect(config, fakes.roles, algorithm, SAMPLING)
    assert fakes.temperatures == [0.0, 1.0] and found.baselines == {0: 1.0, 1: 0.0}
    samples = prepare(config, algorithm, found)
    assert [sample.scalar_advantage for sample in samples.kept] == [0.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0]


def test_length_shapes_rewards_before_they_are_compared() -> None:
    fakes = Fakes(useful={0})
    config = config_of(prompts=1, name="dr_grpo", overlong_buffer=0.5, overlong_penalty=0.5)
    algorithm = make_algorithm(config.algorithm)
    samples = prepare(config, algorithm, collect(config, fakes.roles, algorithm, SAMPLING))
    # Lengths 3, 6, 9, 12 of 10: the ramp goes from 5 to 10 tokens.
    wanted = [1.0, -0.1, -0.4, -0.5]
    assert [sample.reward for sample in samples.kept] == pytest.approx(wanted)
    mean = sum(wanted) / 4
    assert [sample.scalar_advantage for sample in samples.kept] == pytest.approx([value - mean for value in wanted])
    assert samples.metrics["reward/overlong_penalty"] == pytest.approx(-0.25)


def test_filtered_answers_leave_the_loss_but_not_the_baseline() -> None:
    fakes = Fakes(useful={0})
    config = config_of(prompts=1, name="dr_grpo", overlong_filter=True)
    algorithm = make_algorithm(config.algorithm)
    samples = prepare(config, algorithm, collect(config, fakes.roles, algorithm, SAMPLING))
    assert [sample.scalar_advantage for sample in samples.kept] == [0.75, -0.25, -0.25]
    assert samples.drops["overlong_filtered"] == 1


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_batch_of_empty_answers_stops_the_run_and_names_the_counts(name: str) -> None:
    config = config_of(prompts=2, name=name)
    empty = answered((1,), ())
    rewards = (Reward(value=0.0), Reward(value=0.0, valid=False, error="?"))
    groups = [
        RolloutGroup(prompt=Prompt(prompt_id=index, token_ids=(1,), text=""), trajectories=(empty, empty), rewards=rewards)
        for index in range(2)
    ]
    with pytest.raises(RuntimeError, match=r"no sample of the batch can be trained on; drops: \{'empty_response': 4\}"):
        prepare(config, make_algorithm(config.algorithm), Rollouts(groups=groups))


def test_length_rules_count_what_was_sampled_in_all_turns() -> None:
    """Four sampled tokens of eleven: the buffer of a limit of 5 begins behind 3."""
    turns = conversation((1, 2, 3), (7, 7), (8, 8, 8), (7, 7), (9,))
    cut = replace(turns, finish_reason="length")
    rewards = (Reward(value=1.0), Reward(value=0.0))
    group = RolloutGroup(prompt=Prompt(prompt_id=0, token_ids=(1, 2, 3), text=""), trajectories=(turns, cut), rewards=rewards)
    config = config_of(prompts=1, name="dapo", overlong_buffer=0.4, overlong_penalty=1.0, overlong_filter=True)
    config = replace(config, rollout=replace(config.rollout, max_new_tokens=5))
    samples = prepare(config, make_algorithm(config.algorithm), Rollouts(groups=[group]))
    assert samples.metrics["reward/overlong_penalty"] == pytest.approx(-0.5)
    (kept,) = samples.kept
    assert samples.drops["overlong_filtered"] == 1 and kept.reward == 0.5
    assert kept.num_loss_tokens == 4 and len(kept.token_ids) == 11
