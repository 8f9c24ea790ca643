"""Dynamic sampling, the greedy baseline, length shaping and filtering, on a fake engine and a fake verifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.algos.registry import make_algorithm
from rlx.config.schema import AlgorithmConfig
from rlx.driver.batcher import Batch, Batcher, BatchRules
from rlx.driver.groups import GroupStream, ScoredGroup
from rlx.types.rollout import Prompt, Reward, RolloutGroup, SamplingSpec
from tests.trajectories import answered, conversation

SAMPLING = SamplingSpec(num_samples=4, max_new_tokens=10)


def rules_of(prompts: int = 8, **algorithm: Any) -> BatchRules:
    config = AlgorithmConfig(**algorithm)
    compare = make_algorithm(config).group_advantages
    return BatchRules(prompts_per_step=prompts, max_new_tokens=10, algorithm=config, group_advantages=compare)


@dataclass
class Fakes:
    """Prompts whose ids are ``useful`` get one right answer of four; the others only wrong ones."""

    useful: set[int]
    asked: list[int] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def next(self, num: int) -> list[Prompt]:
        self.asked.append(num)
        start = sum(self.asked[:-1])
        return [Prompt(prompt_id=start + index, token_ids=(1,), text="") for index in range(num)]

    def begin_step(self, step: int) -> None:
        self.steps.append(step)

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

    def stream(self, **options: bool) -> GroupStream:
        return GroupStream(self, self, self, SAMPLING, **options)  # type: ignore[arg-type]


def pull(stream: GroupStream, batcher: Batcher, step: int = 1) -> Batch:
    batch = None
    while batch is None:
        batch = batcher.add(stream.next(batcher.num_wanted, step))
    return batch


def test_seventy_percent_without_signal_still_fill_the_batch() -> None:
    fakes = Fakes(useful={index for index in range(1000) if index % 10 < 3})
    found = pull(fakes.stream(), Batcher(rules_of(prompts=20, name="dapo", dynamic_max_factor=6.0)))
    assert len(found.groups) == 20 and all(group.has_signal for group in found.groups)
    ids = [group.prompt_id for group in found.groups]
    assert ids == sorted(ids)
    asked = found.metrics["dynamic/prompts_asked"]
    assert asked == sum(fakes.asked) <= 120
    useful = asked - found.metrics["dynamic/groups_without_signal"]
    assert useful == 20 + found.metrics["dynamic/groups_surplus"]
    assert found.metrics["dynamic/groups_missing"] == 0
    # What is missing first; then as many as should hold that many useful ones, a batch at most.
    assert fakes.asked == [20, 20, 20, 7] and found.metrics["dynamic/rounds"] == 4
    assert fakes.steps == [1]


def test_without_any_signal_it_stops_at_the_limit() -> None:
    fakes = Fakes(useful=set())
    batcher = Batcher(rules_of(prompts=8, name="dapo", dynamic_max_factor=2.5))
    found = pull(fakes.stream(), batcher)
    assert sum(fakes.asked) == 20
    assert found.is_empty and not found.groups and found.metrics["dynamic/groups_missing"] == 8
    assert found.left_out == {"without_signal": 20} and found.metrics["reward/mean"] == 0.0
    assert batcher.num_wanted == 8


def test_equal_rewards_are_trained_on_where_nobody_asked_for_signal() -> None:
    for name in ("ppo", "grpo"):
        found = pull(Fakes(useful=set()).stream(), Batcher(rules_of(prompts=2, name=name)))
        assert len(found.samples) == 8 and not found.left_out


def test_a_short_batch_is_used_as_it_is() -> None:
    fakes = Fakes(useful={3, 5})
    batcher = Batcher(rules_of(prompts=8, name="grpo", dynamic_sampling=True, dynamic_max_factor=2.0))
    found = pull(fakes.stream(), batcher)
    assert [group.prompt_id for group in found.groups] == [3, 5]
    assert found.metrics["dynamic/groups_missing"] == 6


@pytest.mark.parametrize("dynamic", [False, True])
def test_remax_compares_with_the_greedy_answer(dynamic: bool) -> None:
    fakes = Fakes(useful={0})
    rules = rules_of(prompts=2, name="remax", dynamic_sampling=dynamic, dynamic_max_factor=1.0)
    found = pull(fakes.stream(greedy_baseline=True), Batcher(rules))
    assert fakes.temperatures == [0.0, 1.0] and fakes.asked == [2]
    assert {group.prompt_id: group.baseline for group in found.groups} == ({0: 1.0} if dynamic else {0: 1.0, 1: 0.0})
    advantages = list(found.samples.scalar_advantages or ())
    assert advantages == [0.0, -1.0, -1.0, -1.0] + ([] if dynamic else [0.0] * 4)


def test_length_shapes_rewards_before_they_are_compared() -> None:
    rules = rules_of(prompts=1, name="dr_grpo", overlong_buffer=0.5, overlong_penalty=0.5)
    found = pull(Fakes(useful={0}).stream(), Batcher(rules))
    # Lengths 3, 6, 9, 12 of 10: the ramp goes from 5 to 10 tokens.
    wanted = [1.0, -0.1, -0.4, -0.5]
    assert list(found.samples.rewards) == pytest.approx(wanted)
    mean = sum(wanted) / 4
    assert list(found.samples.scalar_advantages or ()) == pytest.approx([value - mean for value in wanted])
    assert found.metrics["reward/overlong_penalty"] == pytest.approx(-0.25)
    assert found.metrics["reward/mean"] == 0.25


def test_filtered_answers_leave_the_loss_but_not_the_baseline() -> None:
    found = pull(Fakes(useful={0}).stream(), Batcher(rules_of(prompts=1, name="dr_grpo", overlong_filter=True)))
    assert list(found.samples.scalar_advantages or ()) == [0.75, -0.25, -0.25]
    assert found.drops == {"overlong_filtered": 1} and found.metrics["drops/overlong_filtered"] == 1.0


def test_answers_of_old_weights_leave_the_loss_but_not_the_baseline() -> None:
    prompt = Prompt(prompt_id=0, token_ids=(1,), text="")
    old, mixed, fresh = (answered((1,), (7, 7), versions=versions) for versions in ((3, 3), (3, 4), (4, 4)))
    rewards = tuple(Reward(value=value) for value in (1.0, 0.0, 0.0))
    group = ScoredGroup(group=RolloutGroup(prompt=prompt, trajectories=(old, mixed, fresh), rewards=rewards))
    for allowed, present, num_stale in ((None, 9, 0), (0, 4, 2), (1, 4, 0), (1, 5, 2), (0, 5, 3)):
        found = Batcher(rules_of(prompts=1, name="dr_grpo", max_staleness=allowed)).add([group], present)
        assert found is not None and len(found.samples) == 3 - num_stale
        assert found.drops == ({"stale": num_stale} if num_stale else {})
        if num_stale == 2:
            assert list(found.samples.scalar_advantages or ()) == pytest.approx([-1 / 3])


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_batch_of_empty_answers_is_empty_and_has_the_counts(name: str) -> None:
    empty = answered((1,), ())
    rewards = (Reward(value=0.0, valid=False, error="a\nb"), Reward(value=0.0, valid=False, error="?"))
    groups = [
        ScoredGroup(
            group=RolloutGroup(
                prompt=Prompt(prompt_id=index, token_ids=(1,), text=""), trajectories=(empty, empty), rewards=rewards
            )
        )
        for index in range(2)
    ]
    found = Batcher(rules_of(prompts=2, name=name)).add(groups)
    assert found is not None and found.is_empty and found.drops == {"empty_response": 4}
    assert found.metrics["reward/invalid"] == 4.0 and found.verdicts.first_cause == "a b"
    assert "reward/mean" not in found.metrics


def test_length_rules_count_what_was_sampled_in_all_turns() -> None:
    """Four sampled tokens of eleven: the buffer of a limit of 5 begins behind 3."""
    turns = conversation((1, 2, 3), (7, 7), (8, 8, 8), (7, 7), (9,))
    cut = replace(turns, finish_reason="length")
    rewards = (Reward(value=1.0), Reward(value=0.0))
    group = RolloutGroup(prompt=Prompt(prompt_id=0, token_ids=(1, 2, 3), text=""), trajectories=(turns, cut), rewards=rewards)
    rules = rules_of(prompts=1, name="dapo", overlong_buffer=0.4, overlong_penalty=1.0, overlong_filter=True)
    found = Batcher(replace(rules, max_new_tokens=5)).add([ScoredGroup(group=group)])
    assert found is not None and found.metrics["reward/overlong_penalty"] == pytest.approx(-0.5)
    (kept,) = found.samples.rows([0])
    assert found.drops["overlong_filtered"] == 1 and kept.reward == 0.5
    assert kept.num_loss_tokens == 4 and len(kept.token_ids) == 11


def test_the_next_batch_begins_with_nothing() -> None:
    fakes = Fakes(useful={0, 1, 2, 8, 9})
    batcher = Batcher(rules_of(prompts=2, name="grpo", dynamic_sampling=True, dynamic_max_factor=4.0))
    stream = fakes.stream()
    found = [pull(stream, batcher, step) for step in (1, 2)]
    assert [[group.prompt_id for group in batch.groups] for batch in found] == [[0, 1], [2, 8]]
    assert [batch.metrics["dynamic/prompts_asked"] for batch in found] == [2.0, 8.0]
    assert [batch.metrics["dynamic/groups_surplus"] for batch in found] == [0.0, 1.0]
    assert fakes.steps == [1, 2]


def test_the_stream_goes_on_where_its_state_was_taken() -> None:
    class Prompts:
        num = 0

        def next(self, num: int) -> list[Prompt]:
            self.num += num
            return [Prompt(prompt_id=index, token_ids=(1,), text="") for index in range(self.num - num, self.num)]

        def state(self) -> dict[str, int]:
            return {"num": self.num}

        def load_state(self, state: dict[str, int]) -> None:
            self.num = state["num"]

    fakes = Fakes(useful=set())
    first = GroupStream(Prompts(), fakes, fakes, SAMPLING)  # type: ignore[arg-type]
    first.next(3, 1)
    second = GroupStream(Prompts(), fakes, fakes, SAMPLING)  # type: ignore[arg-type]
    second.load_state(first.state())
    assert sorted(group.prompt_id for group in second.next(2, 2)) == [3, 4]


ANSWERS = st.tuples(st.sampled_from(["stop", "length", "abort"]), st.integers(0, 3), st.sampled_from([0.0, 1.0]), st.booleans())


def scored(prompt_id: int, answers: Sequence[tuple[Any, int, float, bool]]) -> ScoredGroup:
    trajectories = tuple(answered((1,), (7,) * size, finish_reason=reason) for reason, size, _, _ in answers)
    rewards = tuple(Reward(value=value, valid=valid, error=None if valid else "?") for _, _, value, valid in answers)
    prompt = Prompt(prompt_id=prompt_id, token_ids=(1,), text="")
    return ScoredGroup(group=RolloutGroup(prompt=prompt, trajectories=trajectories, rewards=rewards))


def batch_of(rules: BatchRules, groups: Sequence[ScoredGroup], shuffle: Any = None) -> tuple[Batch, list[int]]:
    """A batch of the first of these groups, asked for as the batcher wants; each round's in the order that ``shuffle`` gives."""
    batcher, batch, asked = Batcher(rules), None, [0]
    while batch is None:
        wanted = batcher.num_wanted
        assert wanted >= 1
        coming = list(groups[sum(asked) : sum(asked) + wanted])
        assert len(coming) == wanted, "more prompts were asked for than is allowed"
        asked.append(wanted)
        if shuffle is not None:
            shuffle(coming)
        batch = batcher.add(coming)
    return batch, asked[1:]


@given(
    answers=st.lists(st.lists(ANSWERS, min_size=2, max_size=3), min_size=12, max_size=12),
    dynamic=st.booleans(),
    overlong_filter=st.booleans(),
    name=st.sampled_from(["ppo", "grpo"]),
    prompts=st.integers(1, 4),
    random=st.randoms(use_true_random=False),
)
def test_every_group_is_in_the_batch_or_counted_once_in_whatever_order_they_come(
    answers: list[list[Any]], dynamic: bool, overlong_filter: bool, name: str, prompts: int, random: Any
) -> None:
    rules = rules_of(
        prompts=prompts, name=name, dynamic_sampling=dynamic, dynamic_max_factor=3.0, overlong_filter=overlong_filter
    )
    groups = [scored(index, of_prompt) for index, of_prompt in enumerate(answers)]
    batch, asked = batch_of(rules, groups)
    seen = groups[: sum(asked)]
    assert len(seen) == len(batch.groups) + sum(batch.left_out.values())
    assert set(batch.left_out) <= ({"without_signal", "surplus"} if dynamic else set())
    assert sum(len(one.rewards) for one in batch.groups) == len(batch.samples) + sum(batch.drops.values())
    assert batch.is_empty == (not len(batch.samples))
    # Nothing is left out but for a reason, and nothing is in although there is one.
    useful = [one for one in seen if one.has_signal or not dynamic]
    assert list(batch.groups) == useful[:prompts]
    for sample in batch.samples.rows(range(len(batch.samples))):
        kept = [
            (reason, size, value)
            for reason, size, value, valid in answers[sample.group_id]
            if valid and size and reason != "abort" and not (overlong_filter and reason == "length")
        ]
        assert sample.reward in [value for _, size, value in kept if size == sum(sample.loss_mask)]
    again, asked_again = batch_of(rules, groups, random.shuffle)
    assert asked_again == asked
    assert (again.groups, again.samples.trajectories, again.left_out, again.drops) == (
        batch.groups,
        batch.samples.trajectories,
        batch.left_out,
        batch.drops,
    )
    assert again.samples.scalar_advantages == batch.samples.scalar_advantages and again.samples.rewards == batch.samples.rewards
    assert again.metrics == batch.metrics and again.verdicts.first_cause == batch.verdicts.first_cause
