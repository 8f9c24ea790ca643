"""Seconds by name, on a clock that the test turns."""

from __future__ import annotations

import random

import pytest

from rlx.obs.timers import StepTimer


def test_seconds_add_up_by_name_also_on_errors(seed: int) -> None:
    draw = random.Random(seed)
    now = [draw.random() * 1000]
    timer = StepTimer(clock=lambda: now[0])
    spent = {"rollout": 0.0, "score": 0.0}
    idle = 0.0
    for _ in range(7):
        name, seconds, pause = draw.choice(["rollout", "score"]), draw.random() * 5, draw.random()
        with pytest.raises(KeyError), timer(name):
            now[0] += seconds
            raise KeyError(name)
        spent[name] += seconds
        now[0] += pause
        idle += pause
    timer.add("rollout", 2.5)
    metrics = timer.metrics()
    assert metrics["perf/step_s"] == pytest.approx(sum(spent.values()) + idle)
    assert metrics.get("perf/rollout_s") == pytest.approx(spent["rollout"] + 2.5)
    assert metrics.get("perf/score_s", 0.0) == pytest.approx(spent["score"])


def test_nested_timers_each_count_their_whole_block() -> None:
    now = [0.0]
    timer = StepTimer(clock=lambda: now[0])
    with timer("outer"):
        now[0] += 1
        with timer("inner"):
            now[0] += 2
    assert timer.metrics() == {"perf/outer_s": 3.0, "perf/inner_s": 2.0, "perf/step_s": 3.0}
