"""The proof of a sync: engine and trainer must score the same fixed token sequences alike.

An engine may say "success" with wrong weights inside. Log-probabilities depend on nearly every one of them, so a few
short random sequences show a tensor that is corrupt, swapped or old. Where the engine can hand out its tensors,
``find_culprits`` then names the ones that differ.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlx.rollout.control import EngineControl, EngineControlError

NUM_SEQUENCES = 6
MIN_TOKENS, MAX_TOKENS = 5, 24
DEFAULT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
_TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Tensors come back as JSON: of larger ones only the first rows are compared.
_COMPARED_ELEMENTS = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class CanarySpec:
    """What the trainer brings to the canary.

    score_on_trainer  log-probs (temperature 1) of tokens 1..L-1 of each sequence, under the published weights;
                      called on every rank at once, its result is read on the lead
    export            the weights again, like ``publish``'s own iterator (collective); None: no search for the culprit
    dtype             the engines' type of weights
    """

    vocab_size: int
    seed: int
    dtype: Literal["fp32", "bf16"]
    score_on_trainer: Callable[[Sequence[Sequence[int]]], list[list[float]]]
    export: Callable[[], Iterator[tuple[str, Tensor]]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryResult:
    """How far the scores of one engine are from the trainer's: |difference| in nats over all positions.

    ``worst_position`` i is the prediction of token i + 1 of sequence ``worst_sequence``.
    """

    mean_difference: float
    max_difference: float
    worst_sequence: int
    worst_position: int
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """A tensor that the engine holds differently; ``max_difference`` is NaN where shapes do not even match."""

    name: str
    max_difference: float


def is_due(sync_number: int, canary_first: int, canary_every: int) -> bool:
    """Whether sync number 1, 2, ... is verified: the first ``canary_first``, then every ``canary_every``-th (0: never)."""
    if sync_number <= canary_first:
        return True
    return canary_every > 0 and (sync_number - canary_first) % canary_every == 0


def canary_sequences(vocab_size: int, seed: int) -> list[list[int]]:
    """The fixed prompts: ``NUM_SEQUENCES`` of ``MIN_TOKENS`` to ``MAX_TOKENS`` tokens, the shortest and longest included."""
    draw = random.Random(seed)
    lengths = [MIN_TOKENS, MAX_TOKENS, *(draw.randint(MIN_TOKENS, MAX_TOKENS) for _ in range(NUM_SEQUENCES - 2))]
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


def compare(
    engine_logprobs: Sequence[Sequence[float]], trainer_logprobs: Sequence[Sequence[float]], tolerance: float
) -> CanaryResult:
    """Compare scores of the same sequences; passes when the mean |difference| is at most ``tolerance`` (NaN never is).

    Raises ValueError when the two do not have the same lengths.
    """
    lengths = [len(row) for row in engine_logprobs], [len(row) for row in trainer_logprobs]
    if lengths[0] != lengths[1] or not sum(lengths[0]):
        raise ValueError(f"canary: the engine scored {lengths[0]} tokens, the trainer {lengths[1]}")
    differences = {
        (sequence, position): abs(ours - theirs)
        for sequence, (engine_row, trainer_row) in enumerate(zip(engine_logprobs, trainer_logprobs, strict=True))
        for position, (theirs, ours) in enumerate(zip(engine_row, trainer_row, strict=True))
    }
    worst = max(differences, key=lambda place: math.inf if math.isnan(differences[place]) else differences[place])
    mean = sum(differences.values()) / len(differences)
    return CanaryResult(
        mean_difference=mean,
        max_difference=differences[worst],
        worst_sequence=worst[0],
        worst_position=worst[1],
        passed=mean <= tolerance,
    )


def find_culprits(control: EngineControl, tensors: Iterator[tuple[str, Tensor]], dtype: str) -> list[Culprit]:
    """The tensors that the engine holds differently from ``tensors`` (compared bit for bit in the engine's ``dtype``).

    Drives ``tensors`` to its end. Raises EngineControlError when the engine cannot hand out its tensors. Of a tensor of
    more than 4 Mi elements only the first rows are compared, and of a tensor-parallel engine its first rank's share.
    """
    culprits: list[Culprit] = []
    refusal: EngineControlError | None = None
    for name, tensor in tensors:
        if refusal is not None:
            continue
        try:
            difference = _difference(control, name, tensor.detach().to(_TORCH_DTYPE[dtype]).float().cpu())
        except EngineControlError as error:
            refusal = error
            continue
        if difference != 0.0:
            culprits.append(Culprit(name=name, max_difference=difference))
    if refusal is not None:
        raise refusal
    return culprits


def _difference(control: EngineControl, name: str, ours: Tensor) -> float:
    rows = max(1, _COMPARED_ELEMENTS * ours.shape[0] // max(1, ours.numel()))
    theirs = torch.tensor(control.weights_by_name(name, rows), dtype=torch.float32)
    if theirs.dim() != ours.dim() or any(got > own for got, own in zip(theirs.shape, ours.shape, strict=True)):
        return math.nan
    share = ours[tuple(slice(extent) for extent in theirs.shape)]
    differs = ~((share == theirs) | (share.isnan() & theirs.isnan()))
    return float((share - theirs).abs()[differs].max()) if bool(differs.any()) else 0.0
