"""Every number of the configuration has limits, and breaking them is an error that names the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest

from rlx.config.convert import Entry, all_entries, row_class, section_entries

Problems = Callable[..., tuple[str, ...]]


def _kinds(entry: Entry) -> set[object]:
    return {entry.hint, *get_args(entry.hint)}


def _numbers() -> list[Entry]:
    found = [entry for entry in all_entries() if not entry.is_section]
    for entry in list(found):
        row = row_class(entry.hint)
        if row is not None:
            found += section_entries(row, f"{entry.key}.a.")
    return [entry for entry in found if _kinds(entry) & {int, float} and list not in {getattr(entry.hint, "__origin__", None)}]


@pytest.mark.parametrize("entry", _numbers(), ids=lambda entry: entry.key)
def test_no_number_is_without_limits(problems: Problems, entry: Entry) -> None:
    for value in (10**30, -(10**30), "1e23", "-1e23", ".inf", "-.inf", ".nan", "true", "'x'"):
        found = problems(f"{entry.key}={value}")
        assert any(line.startswith(f"{entry.key}: ") for line in found), (value, found)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=18446744073709551616", "run.seed: must be at most 2147483647"),
        ("run.steps=1e23", "run.steps: expected an integer, got 1e+23 (float)"),
        ("run.steps=100000000000000000000000", "run.steps: must be at most 2147483647"),
        ("reward.timeout_s=-1", "reward.timeout_s: must be at least 0.01"),
        ("sync.timeout_s=1e23", "sync.timeout_s: must be at most 1000000000"),
        ("rollout.top_p=1.5", "rollout.top_p: must be at most 1"),
        ("rollout.top_k=-2", "rollout.top_k: must be at least -1"),
        ("optimizer.eps=0", "optimizer.eps: must be above 0"),
        ("cluster.nodes=1000000000", "cluster.nodes: must be at most 65536"),
    ],
)
def test_what_breaks_a_limit_is_one_problem(problems: Problems, override: str, words: str) -> None:
    (problem,) = problems(override)
    assert problem.startswith(words)
