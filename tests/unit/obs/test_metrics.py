"""metrics.jsonl: what is written is read, what is not finite is refused, a resume drops the newer rows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from rlx.obs.metrics import MetricsWriter, read_metrics
from rlx.types.rollout import StepReport


def _report(step: int, draw: random.Random) -> StepReport:
    return StepReport(step=step, metrics={"loss/policy": draw.gauss(0, 3), "kl/ref": draw.random() * 1e-9, "drops/long": 3})


def test_rows_are_on_disk_at_once_and_read_back(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = [_report(step, draw) for step in range(1, 6)]
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for count, row in enumerate(rows, start=1):
            writer.write(row)
            assert read_metrics(path) == rows[:count]
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"step": 1, **rows[0].metrics}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        with pytest.raises(ValueError, match=r"policy/grad_norm.*step 7"):
            writer.write(StepReport(step=7, metrics={"ok": 1.0, "policy/grad_norm": value}))
        assert path.read_text() == ""
        writer.write(StepReport(step=7, metrics={"ok": 1.0}))
    assert [row.step for row in read_metrics(path)] == [7]


def test_a_metric_may_not_take_the_place_of_the_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m") as writer, pytest.raises(ValueError, match="'step'"):
        writer.write(StepReport(step=1, metrics={"step": 2.0}))


def test_truncation_drops_newer_rows_and_writing_goes_on(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = [_report(step, draw) for step in range(1, 10)]
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.write(row)
    keep = draw.randrange(0, 9)
    again = _report(keep + 1, draw)
    with MetricsWriter(path) as writer:
        with pytest.raises(ValueError, match="step 9"):
            writer.write(again)
        writer.truncate_after(keep)
        writer.write(again)
    assert read_metrics(path) == [*rows[:keep], again]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_dropped_and_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.5}\n{"step": 2, "a": ')
    assert [row.step for row in read_metrics(path)] == [1]
    with MetricsWriter(path) as writer:
        writer.write(StepReport(step=2, metrics={"a": 2.5}))
    assert read_metrics(path) == [StepReport(step=1, metrics={"a": 1.5}), StepReport(step=2, metrics={"a": 2.5})]


@pytest.mark.parametrize("line", ["nonsense", '{"a": 1}', "[1]", "3"])
def test_a_broken_line_within_is_an_error_that_says_where(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
