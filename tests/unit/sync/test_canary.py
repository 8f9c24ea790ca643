"""The canary's arithmetic and its calendar."""

from __future__ import annotations

import math
import random

import pytest

from rlx.sync.canary import MAX_TOKENS, MIN_TOKENS, canary_sequences, compare, is_due


def test_sequences_are_fixed_and_inside_the_vocabulary():
    vocab_size = random.randrange(11, 5000)
    first = canary_sequences(vocab_size, 3)
    assert first == canary_sequences(vocab_size, 3) != canary_sequences(vocab_size, 4)
    assert {len(row) for row in first} >= {MIN_TOKENS, MAX_TOKENS}
    assert all(MIN_TOKENS <= len(row) <= MAX_TOKENS and min(row) >= 0 and max(row) < vocab_size for row in first)


def test_compare_measures_mean_max_and_place():
    trainer = [[random.uniform(-9, -1) for _ in range(length)] for length in (4, 11, 7)]
    engine = [list(row) for row in trainer]
    engine[1][6] -= 0.66
    engine[2][0] += 0.22
    result = compare(engine, trainer, 0.05)
    assert result.mean_difference == pytest.approx(0.88 / 22)
    assert result.max_difference == pytest.approx(0.66)
    assert (result.worst_sequence, result.worst_position, result.passed) == (1, 6, True)
    assert not compare(engine, trainer, 0.03).passed


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_scores_that_are_no_numbers_fail(broken):
    trainer = [[-1.0, -2.0, -3.0]]
    result = compare([[-1.0, broken, -3.0]], trainer, 1e9)
    assert not result.passed and (result.worst_sequence, result.worst_position) == (0, 1)


def test_other_lengths_are_an_error():
    with pytest.raises(ValueError, match=r"scored \[2\] tokens, the trainer \[3\]"):
        compare([[-1.0, -2.0]], [[-1.0, -2.0, -3.0]], 1.0)


@pytest.mark.parametrize(
    ("first", "every", "due"), [(3, 4, [1, 2, 3, 7, 11]), (0, 5, [5, 10]), (2, 0, [1, 2]), (0, 0, []), (1, 1, list(range(1, 13)))]
)
def test_calendar(first, every, due):
    assert [number for number in range(1, 13) if is_due(number, first, every)] == due
