"""The search compares what an engine hands out: whole tensors, padded vocabularies, first rows, one rank's share, nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlx.rollout.sglang.control import EngineControlError
from rlx.sync.proof.tensor_compare import Findings, find_culprits
from rlx.types.precision import BF16

NAME = "model.embed_tokens.weight"
UNFIT = f"{NAME} (by up to nan)"


class Engine:
    """Holds one tensor; None: does not give it."""

    def __init__(self, held: Tensor | None) -> None:
        self.held = held

    def weights_by_name(self, name: str, num_rows: int) -> object:
        if self.held is None:
            raise EngineControlError("http://e", "GET /get_weights_by_name", "HTTP 400", refused=True)
        return self.held[:num_rows].tolist()


def changed(tensor: Tensor, row: int) -> Tensor:
    tensor = tensor.clone()
    tensor[row, 0] += 0.5
    return tensor


WHOLE = torch.randn(131, 8).bfloat16().float()
LARGE = torch.randn(3000, 200).bfloat16().float()


@pytest.mark.parametrize(
    ("ours", "held", "found"),
    [
        (WHOLE, WHOLE, Findings(num_tensors=1)),
        (WHOLE, torch.cat([WHOLE, torch.zeros(61, 8)]), Findings(num_tensors=1)),
        (
            WHOLE,
            torch.cat([WHOLE, torch.ones(61, 8)]),
            Findings(num_tensors=1, num_by_share=1, culprits=[f"{NAME} (by up to nan)"]),
        ),
        (WHOLE, changed(WHOLE, 130), Findings(num_tensors=1, culprits=[f"{NAME} (by up to 0.5)"])),
        (WHOLE, WHOLE[:66], Findings(num_tensors=1, num_by_share=1)),
        (LARGE, LARGE, Findings(num_tensors=1, num_by_rows=1)),
        (LARGE, changed(LARGE, 7), Findings(num_tensors=1, num_by_rows=1, culprits=[f"{NAME} (by up to 0.5)"])),
    ],
)
def test_what_differs_and_how_much_was_seen(ours: Tensor, held: Tensor, found: Findings) -> None:
    assert find_culprits(Engine(held), iter([(NAME, ours)]), BF16) == found  # type: ignore[arg-type]


def test_an_engine_that_gives_nothing_is_asked_once() -> None:
    tensors = iter([("a", WHOLE), ("b", WHOLE)])
    found = find_culprits(Engine(None), tensors, BF16)  # type: ignore[arg-type]
    assert len(found.refusals) == 1 and not found.is_proof and next(tensors, None) is None
