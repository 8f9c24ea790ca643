"""Steps that have nothing to train on: nothing is learnt or published, they are counted, and too many end the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from rlx.driver.ppo import PPOTrainer
from rlx.obs.log import logger
from rlx.types.rollout import Reward, RolloutGroup
from tests.unit.trainer.test_loop import Calls, make_trainer

DAPO = {"name": "dapo", "dynamic_max_factor": 2.0, "overlong_buffer": 0.0, "overlong_filter": False}


class Judge:
    """``values`` are the verdicts on the four answers to each prompt of a step, in steps to come; None: invalid."""

    def __init__(self, *values: tuple[float | None, ...]) -> None:
        self.values = list(values)
        self.rounds = 0

    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        for group in groups:
            rewards = [
                Reward(value=9.0, valid=False, error="no") if value is None else Reward(value=value) for value in self.values[0]
            ]
            yield replace(group, rewards=tuple(rewards))

    def close(self) -> None: ...


DIFFER, EQUAL, INVALID = (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), (None,) * 4


def trainer_of(calls: Calls, *values: tuple[float | None, ...], **algorithm: Any) -> tuple[PPOTrainer, Judge]:
    trainer, judge = make_trainer(calls, **algorithm), Judge(*values)
    trainer.stream._reward = judge
    return trainer, judge


def step(trainer: PPOTrainer, judge: Judge) -> dict[str, float]:
    row = trainer.step()
    judge.values.pop(0)
    assert row.step == trainer.num_steps_done
    return dict(row.metrics)


@pytest.mark.parametrize(
    ("algorithm", "verdicts", "why"),
    [
        (DAPO, EQUAL, "groups left out: without_signal 6"),
        (DAPO, INVALID, "groups left out: without_signal 6"),
        ({"name": "grpo"}, INVALID, "answers dropped: empty_response 3, invalid_reward 9"),
        ({"name": "ppo"}, INVALID, "answers dropped: empty_response 3, invalid_reward 9"),
    ],
)
def test_an_empty_step_learns_and_publishes_nothing_and_says_why(
    algorithm: dict[str, Any],
    verdicts: tuple[float | None, ...],
    why: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    calls = Calls()
    trainer, judge = trainer_of(calls, DIFFER, verdicts, DIFFER, **algorithm)
    step(trainer, judge)
    done = list(calls.names)
    with caplog.at_level("INFO", logger="rlx"):
        metrics = step(trainer, judge)
    assert calls.names == done and trainer.weight_version == 1
    said = [text for text in caplog.messages if text.startswith("NOTICE step")]
    assert said == [f"NOTICE step 2: nothing to train on, 1 in a row (run.max_empty_steps=3): {why}"]
    assert metrics["batch/empty_steps"] == 1.0 and metrics["response/tokens_mean"] == 1.5
    assert not {"sync/version", "loss/policy", "policy/grad_norm"} & set(metrics)
    assert ("reward/mean" in metrics) == (verdicts is EQUAL)
    metrics = step(trainer, judge)
    assert calls.names[-1] == "publish 3" and metrics["sync/version"] == 3.0 and "batch/empty_steps" not in metrics


def test_a_critic_learns_from_equal_rewards() -> None:
    calls = Calls()
    trainer, judge = trainer_of(calls, EQUAL, name="ppo")
    step(trainer, judge)
    assert calls.names[-1] == "publish 1"


def test_so_many_in_a_row_end_the_run_with_the_counts() -> None:
    calls = Calls()
    trainer, judge = trainer_of(calls, EQUAL, EQUAL, DIFFER, EQUAL, INVALID, EQUAL, **DAPO)
    assert [step(trainer, judge).get("batch/empty_steps") for _ in range(5)] == [1.0, 2.0, None, 1.0, 2.0]
    message = r"nothing to train on in 3 steps in a row \(run\.max_empty_steps=3\), the last of them step 6:"
    with pytest.raises(RuntimeError, match=rf"{message} groups left out: without_signal 18$"):
        trainer.step()
    assert calls.names.count("publish 3") == 1 and calls.names[-1] == "publish 3"


def test_a_run_goes_on_from_an_empty_step_as_it_would_have() -> None:
    """With the version of the weights that it has, and with the empty steps behind it."""
    trainer, judge = trainer_of(Calls(), DIFFER, EQUAL, EQUAL, EQUAL, **DAPO)
    for _ in range(3):
        step(trainer, judge)
    saved = json.loads(json.dumps(trainer.state()))
    calls = Calls()
    again, _ = trainer_of(calls, EQUAL, **DAPO)
    again.load_state(saved)
    again.publish_start()
    assert calls.names == ["publish 1"] and again.num_steps_done == 3 and again.state() == trainer.state()
    with pytest.raises(RuntimeError, match=r"3 steps in a row .* step 4: groups left out: without_signal 18"):
        again.step()


def test_a_checkpoint_that_knows_no_empty_steps_had_published_its_step() -> None:
    trainer = make_trainer(Calls())
    trainer.step()
    saved = {key: value for key, value in trainer.state().items() if key not in ("weight_version", "empty_steps")}
    calls = Calls()
    again = make_trainer(calls)
    again.load_state(saved)
    again.publish_start()
    assert calls.names == ["publish 1"] and again.state() == trainer.state()
