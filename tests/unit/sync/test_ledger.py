"""The books: what does not fit the engines' model is named before it is sent."""

from __future__ import annotations

import pytest
import torch

from rlx.sync.errors import SyncError
from rlx.sync.manifest import Ledger

EXPECTED = {"a.weight": (3, 5), "b.weight": (7,), "c.weight": (2, 2)}


def tensors(**shapes):
    return iter([(name.replace("_", "."), torch.randn(shape)) for name, shape in shapes.items()])


def test_two_stages_complete_the_model():
    ledger, other = Ledger(EXPECTED), Ledger(EXPECTED)
    assert [name for name, _ in ledger.checked(tensors(a_weight=(3, 5), b_weight=(7,)))] == ["a.weight", "b.weight"]
    assert not ledger.depart(2)
    other.record(ledger.tensors)
    list(other.checked(tensors(c_weight=(2, 2))))
    assert other.depart(1)
    other.check_complete()
    with pytest.raises(SyncError, match=r"1 tensors .* missing: c\.weight"):
        ledger.check_complete()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("x.weight", torch.randn(3)), r"x\.weight is unknown"),
        (("b.weight", torch.randn(8)), r"b\.weight has shape \[8\], .* needs \[7\]"),
        (("b.weight", torch.randn(7, 1)), r"b\.weight has shape \[7, 1\]"),
        (("b.weight", torch.randn(7, dtype=torch.float64)), r"b\.weight has dtype torch\.float64"),
        (("b.weight", torch.zeros(7, dtype=torch.int8)), r"b\.weight has dtype torch\.int8"),
        (("a.weight", torch.randn(3, 5)), r"a\.weight is sent twice"),
    ],
)
def test_a_wrong_tensor_is_named_and_not_passed_on(wrong, message):
    ledger = Ledger(EXPECTED)
    passed: list[str] = []
    with pytest.raises(SyncError, match=message):
        passed.extend(name for name, _ in ledger.checked(iter([("a.weight", torch.randn(3, 5)), wrong])))
    assert [info.name for info in ledger.tensors] == ["a.weight"]


def test_a_tensor_of_two_stages_is_named():
    ledger = Ledger(EXPECTED)
    list(ledger.checked(tensors(b_weight=(7,))))
    with pytest.raises(SyncError, match=r"b\.weight is sent twice, the second time by another stage"):
        ledger.record(ledger.tensors)
