"""pass@k against counting every subset."""

from __future__ import annotations

from itertools import combinations

import pytest

from rlx.trainer.evaluate import at_k, pass_chance


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_chance_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([1] * right + [0] * (n - right), k))
            assert pass_chance(n, right, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_at_k_leaves_out_what_is_too_short() -> None:
    found = at_k([[1.0, 0.0, 0.4], [0.0, 0.0, 0.0], [1.0], []], 3, pass_reward=1.0)
    assert found["eval/mean@3"] == pytest.approx((1.4 / 3 + 0 + 1) / 3)
    assert found["eval/pass@1"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert found["eval/pass@2"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["eval/pass@3"] == pytest.approx(1 / 2)
