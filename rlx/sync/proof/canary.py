"""The proof of a sync: engine and trainer must score the same fixed token sequences alike.

An engine may say "success" with wrong weights inside. Log-probabilities depend on nearly every one of them, so a few
short random sequences show a tensor that is corrupt, swapped or old. A model with a tower scores sequences with images too, and
these must pass by themselves. Where the engine can hand out its tensors,
``rlx.sync.proof.tensor_compare`` then names the ones that differ.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from rlx.data.images.grid import num_image_tokens
from rlx.rollout.images import ImageStore, PlacedImages
from rlx.sync.proof.noise import write_noise
from rlx.sync.proof.tensor_compare import Findings
from rlx.types.precision import Precision
from rlx.types.rollout import ImageSpan

NUM_SEQUENCES = 6
MIN_TOKENS, MAX_TOKENS = 5, 24
# Of the sequences with images: sides in merged patches, which windows of any family's cut, odd and even.
IMAGE_SIDES = (((5, 6),), ((3, 2), (1, 7)))
# Times the tolerance: how far off an engine may be whose tensors are proved equal, and one of which only the scores are known.
WIDE, NARROW = 10.0, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CanarySpec:
    """What the trainer brings to the canary.

    score_on_trainer  log-probs (temperature 1) of tokens 1..L-1 of each sequence with its images (none at all for a model of
                      text), under the published weights; called on every rank at once, its result is read on the lead
    export            the weights again, like ``publish``'s own iterator (collective); None: no search for the culprit
    precision         the engines'
    images            where the trainers look for images; None: the model sees none
    """

    vocab_size: int
    seed: int
    precision: Precision
    score_on_trainer: Callable[[Sequence[Sequence[int]], Sequence[Sequence[ImageSpan]]], list[list[float]]]
    export: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
    images: ImageStore | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CanarySequence:
    """A fixed prompt. ``images`` None: text."""

    token_ids: list[int]
    images: PlacedImages | None = None

    @property
    def spans(self) -> tuple[ImageSpan, ...]:
        return () if self.images is None else self.images.spans

    def text_scores(self, scores: Sequence[float]) -> list[float]:
        """Of log-probs of tokens 1..L-1 those of text: an engine has none of placeholders."""
        places = frozenset() if self.images is None else self.images.places
        return [score for place, score in enumerate(scores, start=1) if place not in places]


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryResult:
    """How far the scores of one engine are from the trainer's: |difference| in nats over all positions.

    ``worst_position`` i is the prediction of token i + 1 of sequence ``worst_sequence``.
    """

    mean_difference: float
    median_difference: float
    max_difference: float
    worst_sequence: int
    worst_position: int
    passed: bool

    @property
    def words(self) -> str:
        return (
            f"mean difference {self.mean_difference:.3g}, median {self.median_difference:.3g}, largest {self.max_difference:.3g}"
            f" at sequence {self.worst_sequence}, position {self.worst_position}"
        )


def is_due(sync_number: int, canary_first: int, canary_every: int) -> bool:
    """Whether sync number 1, 2, ... is verified: the first ``canary_first``, then every ``canary_every``-th (0: never)."""
    if sync_number <= canary_first:
        return True
    return canary_every > 0 and (sync_number - canary_first) % canary_every == 0


def canary_sequences(vocab_size: int, seed: int, images: ImageStore | None = None) -> list[CanarySequence]:
    """The fixed prompts: ``NUM_SEQUENCES`` of ``MIN_TOKENS`` to ``MAX_TOKENS`` tokens, the shortest and longest included; with a
    tower some more that hold pictures of noise, which are written where ``images`` says."""
    draw = random.Random(seed)
    lengths = [MIN_TOKENS, MAX_TOKENS, *(draw.randint(MIN_TOKENS, MAX_TOKENS) for _ in range(NUM_SEQUENCES - 2))]
    texts = [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]
    found = [CanarySequence(token_ids=tokens) for tokens in texts]
    if images is None:
        return found
    vision = images.vision
    for sides in IMAGE_SIDES:
        ids, spans = [draw.randrange(vocab_size) for _ in range(MIN_TOKENS)], []
        for number, (down, across) in enumerate(sides):
            key = write_noise(images, down, across, seed + number)
            grid = (1, down * vision.merge, across * vision.merge)
            spans.append(ImageSpan(key=key, start=len(ids) + 1, grid=grid))
            ids += [vision.start_token, *[vision.image_token] * num_image_tokens(grid, vision.merge), vision.end_token]
            ids += [draw.randrange(vocab_size) for _ in range(MAX_TOKENS // 2)]
        found.append(CanarySequence(token_ids=ids, images=PlacedImages(store=images, spans=tuple(spans))))
    return found


def compare(
    engine_logprobs: Sequence[Sequence[float]],
    trainer_logprobs: Sequence[Sequence[float]],
    tolerance: float,
    num_texts: int | None = None,
) -> CanaryResult:
    """Compare scores of the same sequences; passes when the mean |difference| is at most ``tolerance`` (NaN never is). After the
    first ``num_texts`` (None: all) come sequences with images: their mean counts by itself, and the larger one is told.

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
    border = len(lengths[0]) if num_texts is None else num_texts
    kinds = [[d for (sequence, _), d in differences.items() if (sequence < border) is is_text] for is_text in (True, False)]
    means = [sum(kind) / len(kind) for kind in kinds if kind]
    return CanaryResult(
        mean_difference=math.nan if any(map(math.isnan, means)) else max(means),
        median_difference=max(median(kind) for kind in kinds if kind),
        max_difference=differences[worst],
        worst_sequence=worst[0],
        worst_position=worst[1],
        passed=all(mean <= tolerance for mean in means),
    )


def judge(
    first: CanaryResult, second: CanaryResult | None, found: Findings, tolerance: float, limit: float = math.inf
) -> tuple[bool, str]:
    """Whether an engine that did not pass is at fault, and why (not). ``second`` are its scores with empty caches, None when
    tensors differ. ``limit``: the mean beyond which it is in any case.

    With tensors proved equal it may be ``WIDE`` times the tolerance off: what computes another way rounds another way, and
    a wrong cache or configuration shows in nats. Where the engine does not hand out (all of) its tensors, rounding is believed
    of a difference that sits in few places: the median within the tolerance, the mean within ``NARROW`` times it.
    """
    if found.culprits or second is None:
        return True, f"Tensors that differ: {', '.join(found.culprits)}"
    again = f"with empty caches {second.words}"
    if found.is_proof:
        some = f" ({found.num_by_rows} large ones by their first rows)" if found.num_by_rows else ""
        equal = f"Tensors that differ: none found, {found.num_tensors} are equal to the trainer's{some}; {again}"
        if second.mean_difference <= min(WIDE * tolerance, limit):
            most = f"{WIDE:g} times the tolerance of {tolerance:g}" if WIDE * tolerance <= limit else f"{limit:g}"
            return False, f"{equal}; rounding, up to {most}, is let pass"
        return True, (
            f"{equal}. The weights are equal but the engine computes otherwise: a stale cache, or another configuration of the"
            " model (rope, norms, heads) or of the server"
        )
    unknown = "; ".join(found.refusals) or f"of {found.num_by_share} tensors only the first rank's share is known"
    text = f"Tensors that differ: none found, but {unknown}; {again}"
    if second.median_difference <= tolerance and second.mean_difference <= min(NARROW * tolerance, limit):
        return False, f"{text}; the median is within the tolerance of {tolerance:g}, as with rounding"
    return True, f"{text}; that is more than rounding"
