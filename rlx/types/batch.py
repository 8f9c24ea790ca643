"""What a trainer rank computes on: micro-batches, and what losses take and give.

Shape legend, used in every docstring and name:

    T  packed tokens of one micro-batch (sequences laid end to end)
    S  sequences in one micro-batch
    L  tokens of one sample
    V  vocabulary entries

Token columns have two alignments. *Token-aligned* columns of a sample (length L) say something about token i
itself. *Position-aligned* columns (names in a ``MicroBatch`` and in ``LossInputs``) say something about the
prediction made AT position t, that is, about token t + 1. ``rlx.data.collate`` is the one place that shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields

from torch import Tensor

from rlx.types.rollout import ImageSpan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns[C]:
    """What is known of every token of a batch, position-aligned float32: one field a column, None while it is not there.

    ``C`` is how a column is held: a tensor [T] in a micro-batch, [L] tensors by sample id on a rank.

    weights            what each token counts for in the policy's (or the fine-tuned model's) loss
    sequence_weights   1 / response tokens of its sequence
    outcomes           the reward of its sequence
    old_logprobs       of the policy before the update, and ``entropy`` its entropy
    ref_logprobs       of the reference
    process_logprobs   of the process reward model
    values             of the critic
    advantages, returns
    importance         the correction for the engine's drift

    >>> scored = Columns(old_logprobs={7: torch.tensor([-0.5, -1.0, 0.0])})
    >>> replace(scored, values={7: torch.tensor([0.1, 0.2, 0.0])}).present()  # the names old_logprobs and values
    """

    weights: C | None = None
    sequence_weights: C | None = None
    outcomes: C | None = None
    old_logprobs: C | None = None
    entropy: C | None = None
    ref_logprobs: C | None = None
    process_logprobs: C | None = None
    values: C | None = None
    advantages: C | None = None
    returns: C | None = None
    importance: C | None = None

    def present(self) -> Iterator[tuple[str, C]]:
        """The columns that are there, by name."""
        for entry in fields(self):
            column: C | None = getattr(self, entry.name)
            if column is not None:
                yield entry.name, column

    def map[D](self, change: Callable[[str, C], D]) -> Columns[D]:
        """Every column that is there, changed; ``change`` gets its name too, for its errors."""
        return Columns(**{name: change(name, column) for name, column in self.present()})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Packed sequences of one forward pass, before the context-parallel split. Position-aligned columns.

    tokens_T, labels_T   int64; ``labels_T[t]`` is the token predicted at t (0 where there is none)
    loss_mask_T          float32; 1 where the predicted token is a response token
    cu_seqlens_S1        int32 [S + 1]; borders of the sequences, padding of each counted to it
    lengths_S            int64 [S]; true lengths, without padding
    sample_ids           the samples in order; padding sequences have id -1
    images               the images of the sequences, in order; ``start`` counts in the pack
    kept_features        what towers that do not learn made of an image, by tower and key, on the host; all packs share it
    columns              more float32 [T] columns: old_logprobs, advantages, ...
    """

    tokens_T: Tensor
    labels_T: Tensor
    loss_mask_T: Tensor
    cu_seqlens_S1: Tensor
    lengths_S: Tensor
    sample_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...] = ()
    kept_features: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    columns: Columns[Tensor] = field(default_factory=Columns)

    @property
    def max_seqlen(self) -> int:
        return int((self.cu_seqlens_S1[1:] - self.cu_seqlens_S1[:-1]).max())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """What a loss may look at, position-aligned, for the tokens this rank holds (float32 [T]).

    ``logprobs_T`` / ``entropy_T`` / ``values_T`` carry gradients; everything else is data. Columns a loss does not
    use may be None. ``weights_T`` is what each token counts for in the sum (0 off the response); the division by the
    mini-batch's global count happens outside, once. ``importance_T`` (1 where None) scales the policy term alone.

    ``sequence_T`` (int64) numbers each token's sequence in the micro-batch, 0 to ``num_sequences`` - 1. Context parallelism
    spreads a sequence over ranks; ``sum_over_ranks`` adds a tensor up over them, with gradient (None: one rank has all).
    """

    weights_T: Tensor
    importance_T: Tensor | None = None
    sequence_T: Tensor | None = None
    num_sequences: int = 0
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    logprobs_T: Tensor | None = None
    entropy_T: Tensor | None = None
    values_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    advantages_T: Tensor | None = None
    old_values_T: Tensor | None = None
    returns_T: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossOutput:
    """``loss`` is a SUM over tokens (0-dim, with gradient). ``stats`` are sums and counts [2], so that reducing them
    over ranks and micro-batches is always a sum; the reported value is sum / count."""

    loss: Tensor
    stats: Mapping[str, Tensor]
