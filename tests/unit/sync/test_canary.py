"""The canary's arithmetic and its calendar."""

from __future__ import annotations

import math
import random
from hashlib import sha256
from pathlib import Path

import pytest

from rlx.data.images.pixels import image_file, pixels
from rlx.rollout.images import ImageStore, check_places
from rlx.sync.proof.canary import MAX_TOKENS, MIN_TOKENS, canary_sequences, compare, is_due, judge
from rlx.sync.proof.tensor_compare import Findings, merge
from rlx.types.precision import BF16, in_fp8
from tests.tower import tower

IMAGE = 60
VISION = tower(IMAGE)


def test_sequences_are_fixed_and_inside_the_vocabulary():
    vocab_size = random.randrange(11, 5000)
    first = canary_sequences(vocab_size, 3)
    assert first == canary_sequences(vocab_size, 3) != canary_sequences(vocab_size, 4)
    rows = [sequence.token_ids for sequence in first]
    assert {len(row) for row in rows} >= {MIN_TOKENS, MAX_TOKENS}
    assert all(MIN_TOKENS <= len(row) <= MAX_TOKENS and min(row) >= 0 and max(row) < vocab_size for row in rows)


def test_with_a_tower_come_sequences_with_pictures_that_any_rank_writes_alike(tmp_path: Path) -> None:
    stores = [ImageStore(folder=tmp_path / name, vision=VISION) for name in ("one", "other")]
    found = canary_sequences(50, 3, stores[0])
    assert found[:-2] == canary_sequences(50, 3)
    assert [len(sequence.spans) for sequence in found[-2:]] == [1, 2]
    assert [each.spans for each in canary_sequences(50, 3, stores[1])] == [each.spans for each in found]
    for sequence in found[-2:]:
        check_places(sequence.token_ids, sequence.spans, VISION, "canary")
        for store in stores:
            for span in sequence.spans:
                rows = pixels(image_file(store.folder, span.key), span, VISION)
                assert (
                    len(rows) == span.grid[1] * span.grid[2]
                    and sha256(image_file(store.folder, span.key).read_bytes()).hexdigest() == span.key
                )
        placeholders = sum(token == VISION.image_token for token in sequence.token_ids)
        scores = [float(place) for place in range(1, len(sequence.token_ids))]
        left = sequence.text_scores(scores)
        assert len(left) == len(scores) - placeholders
        assert all(sequence.token_ids[int(place)] != VISION.image_token for place in left)


def test_sequences_with_images_pass_by_themselves() -> None:
    """A tower that went astray is not lost among texts that are right."""
    trainer = [[-1.0] * 20, [-2.0] * 5]
    engine = [[-1.0] * 20, [-2.0, -2.0, -2.2, -2.2, -2.2]]
    assert compare(engine, trainer, 0.05).passed
    result = compare(engine, trainer, 0.05, num_texts=1)
    assert not result.passed and result.mean_difference == pytest.approx(0.12) and result.median_difference == pytest.approx(0.2)
    assert not compare([[-1.1] * 20, [-2.0] * 5], trainer, 0.05, num_texts=1).passed
    assert math.isnan(compare([[-1.0] * 20, [math.nan] * 5], trainer, 0.05, num_texts=1).mean_difference)


def test_compare_measures_mean_max_and_place():
    trainer = [[random.uniform(-9, -1) for _ in range(length)] for length in (4, 11, 7)]
    engine = [list(row) for row in trainer]
    engine[1][6] -= 0.66
    engine[2][0] += 0.22
    result = compare(engine, trainer, 0.05)
    assert result.median_difference == 0.0 and "mean difference 0.04, median 0, largest 0.66 at sequence 1" in result.words
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


def found(**what) -> Findings:
    return Findings(**({"num_tensors": 9} | what))


@pytest.mark.parametrize(
    ("findings", "differences", "at_fault"),
    [
        (found(), [0.9] * 5, False),
        (found(num_by_rows=3), [0.9] * 5, False),
        (found(), [1.1] * 5, True),
        (found(culprits=["a (by up to 1)"]), [0.11] * 5, True),
        (found(num_by_share=9), [0.05, 0.05, 0.05, 0.05, 1.0], False),
        (found(num_by_share=9), [0.05, 0.05, 0.05, 0.05, 2.0], True),
        (found(refusals=["no"]), [0.12] * 5, True),
        (Findings(), [0.12] * 5, True),
    ],
)
def test_what_is_believed_depends_on_what_is_known(findings, differences, at_fault):
    result = compare([differences], [[0.0] * 5], 0.1)
    assert not result.passed
    fault, reason = judge(result, result, findings, 0.1)
    assert fault is at_fault and reason


def test_nothing_is_believed_beyond_the_limit_of_the_format() -> None:
    """In FP8 ten times the tolerance would be garbage."""
    fp8 = in_fp8(BF16)
    for off, at_fault in ((1.0, False), (1.4, False), (1.6, True), (7.0, True)):
        result = compare([[-5.0] * 8], [[-5.0 - off] * 8], fp8.canary_tolerance)
        assert not result.passed
        assert judge(result, result, found(), fp8.canary_tolerance, fp8.canary_limit)[0] is at_fault
        assert judge(result, result, found(), fp8.canary_tolerance)[0] is False


def test_findings_of_stages_add_up():
    whole = merge([found(num_by_rows=1), Findings(), found(num_by_share=2, culprits=["x"], refusals=["y"])])
    assert whole == Findings(num_tensors=18, num_by_rows=1, num_by_share=2, culprits=["x"], refusals=["y"])
    assert not whole.is_proof and merge([found(), found()]).is_proof and not merge([]).is_proof
