"""A batch to train on, as flat arrays, and the part of it that a data-parallel rank gets. Knows no torch.

Shape legend: S sequences of a batch, T tokens of all of them laid end to end, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pickle import PickleBuffer
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rlx.types.image_arrays import ImageArrays
from rlx.types.rollout import ImageSpan

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainSample:
    """One sequence of a ``TrainBatch``; its columns are views [L] of the batch's, and writing to them changes the batch.

    ``scalar_advantage`` is the group-relative advantage of the whole sequence, or None when advantages come from a critic.
    """

    sample_id: int
    group_id: int
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    rollout_logprobs: NDArray[np.float32]
    reward: float
    scalar_advantage: float | None = None
    weight_version: int = 0
    images: tuple[ImageSpan, ...] = ()

    def __len__(self) -> int:
        """Tokens, L."""
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens to learn from."""
        return int(np.count_nonzero(self.loss_mask))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainBatch:
    """Sequences to train on. Nine bytes a token, and a handful of numbers a sequence.

    token_ids          int32 [T]
    loss_mask          bool [T]; true on tokens to learn from, wherever they stand
    rollout_logprobs   float32 [T]; the engine's, 0 where nothing was sampled
    offsets            int64 [S + 1]; sequence i has the tokens ``offsets[i]`` to ``offsets[i + 1]`` - 1
    sample_ids         int64 [S]; the row in the whole batch
    group_ids          int64 [S]; sequences that are compared with each other share one
    rewards            float64 [S]
    scalar_advantages  float64 [S]; of the whole sequence; None where a critic supplies them
    weight_versions    int64 [S]; the oldest weights that wrote a token: staleness is judged by the worst case
    images             which images stand where; None where no sequence has any

    Two answers, 7 8 and 9, to the prompt 1 2 of group 5, sampled under weights 3:

        token_ids         1 2 7 8 1 2 9      offsets          0 4 7      rewards            1 0
        loss_mask         0 0 1 1 0 0 1      sample_ids       0 1        scalar_advantages  0.5 -0.5
        rollout_logprobs  0 0 a b 0 0 c      group_ids        5 5        weight_versions    3 3

    ``rows([1])`` has the last three tokens, offsets 0 3 and sample id 1; ``batch[1]`` is a view of the same.
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    rollout_logprobs: NDArray[np.float32]
    offsets: Ints
    sample_ids: Ints
    group_ids: Ints
    rewards: Floats
    scalar_advantages: Floats | None
    weight_versions: Ints
    images: ImageArrays | None = None

    @classmethod
    def of_lengths(
        cls,
        lengths: Sequence[int],
        *,
        group_ids: Sequence[int],
        sample_ids: Sequence[int] | None = None,
        rewards: Sequence[float] | None = None,
        scalar_advantages: Sequence[float] | None = None,
        weight_versions: Sequence[int] | None = None,
    ) -> TrainBatch:
        """A batch whose sequences have these lengths; its token columns are zeros, to be written. Ids count from 0; what else
        is left out is 0."""
        num_sequences = len(lengths)
        offsets = [0, *accumulate(lengths)]
        num_tokens = offsets[-1]
        nothing = [0] * num_sequences
        ids = (
            range(num_sequences) if sample_ids is None else sample_ids,
            group_ids,
            nothing if weight_versions is None else weight_versions,
        )
        scores = [nothing if rewards is None else rewards, *(() if scalar_advantages is None else [scalar_advantages])]
        # One block: an allocator that gets three back returns them to the system, part after part, for pages of zeros.
        block = np.zeros(9 * num_tokens, np.uint8)
        return cls(
            token_ids=block[: 4 * num_tokens].view(np.int32),
            rollout_logprobs=block[4 * num_tokens : 8 * num_tokens].view(np.float32),
            loss_mask=block[8 * num_tokens :].view(np.bool_),
            offsets=np.array(offsets, np.int64),
            **_columns(np.array(ids, np.int64), np.array(scores, np.float64)),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For protocol 5, in four buffers: a small one costs the driver as much as a large one, on every rank."""
        scores = [self.rewards] if self.scalar_advantages is None else [self.rewards, self.scalar_advantages]
        ids = [self.sample_ids, self.group_ids, self.weight_versions]
        numbers = np.concatenate([self.offsets, *ids, *(column.view(np.int64) for column in scores)])
        buffers = map(PickleBuffer, (numbers, self.token_ids, self.loss_mask, self.rollout_logprobs))
        return _from_buffers, (len(scores), self.images, *buffers)

    def __len__(self) -> int:
        """Sequences, S."""
        return len(self.sample_ids)

    def __getitem__(self, row: int) -> TrainSample:
        here = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return TrainSample(
            sample_id=int(self.sample_ids[row]),
            group_id=int(self.group_ids[row]),
            token_ids=self.token_ids[here],
            loss_mask=self.loss_mask[here],
            rollout_logprobs=self.rollout_logprobs[here],
            reward=float(self.rewards[row]),
            scalar_advantage=None if self.scalar_advantages is None else float(self.scalar_advantages[row]),
            weight_version=int(self.weight_versions[row]),
            images=() if self.images is None else self.images.of_sequence(row),
        )

    def __iter__(self) -> Iterator[TrainSample]:
        return (self[row] for row in range(len(self)))

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        found: list[int] = np.diff(self.offsets).tolist()
        return found

    @property
    def loss_tokens(self) -> list[int]:
        """Tokens to learn from of each sequence."""
        return [int(np.count_nonzero(part)) for part in self._cut(self.loss_mask, range(len(self)))]

    def rows(self, indices: Sequence[int]) -> TrainBatch:
        """These sequences, in this order, as arrays of their own."""
        chosen = np.array(indices, np.int64)
        offsets = np.zeros(len(chosen) + 1, np.int64)
        np.cumsum(self.offsets[chosen + 1] - self.offsets[chosen], out=offsets[1:])
        advantages = self.scalar_advantages
        return TrainBatch(
            token_ids=self._gather(self.token_ids, indices),
            loss_mask=self._gather(self.loss_mask, indices),
            rollout_logprobs=self._gather(self.rollout_logprobs, indices),
            offsets=offsets,
            sample_ids=self.sample_ids[chosen],
            group_ids=self.group_ids[chosen],
            rewards=self.rewards[chosen],
            scalar_advantages=None if advantages is None else advantages[chosen],
            weight_versions=self.weight_versions[chosen],
            images=None if self.images is None else self.images.rows(indices),
        )

    def _gather(self, column: NDArray[Any], indices: Sequence[int]) -> NDArray[Any]:
        return np.concatenate([column[:0], *self._cut(column, indices)])

    def _cut(self, column: NDArray[Any], indices: Sequence[int]) -> Iterator[NDArray[Any]]:
        borders = self.offsets.tolist()
        return (column[borders[index] : borders[index + 1]] for index in indices)


def _from_buffers(num_scores: int, images: ImageArrays | None, numbers: Any, *columns: Any) -> TrainBatch:
    """What ``TrainBatch.__reduce__`` took apart. The arrays are the buffers' own memory."""
    token_ids, loss_mask, rollout_logprobs = columns
    read = np.frombuffer(numbers, np.int64)
    num_sequences = len(read) // (4 + num_scores)  # offsets have one number more
    table = read[num_sequences + 1 :].reshape(3 + num_scores, num_sequences)
    return TrainBatch(
        token_ids=np.frombuffer(token_ids, np.int32),
        loss_mask=np.frombuffer(loss_mask, np.bool_),
        rollout_logprobs=np.frombuffer(rollout_logprobs, np.float32),
        offsets=read[: num_sequences + 1],
        images=images,
        **_columns(table[:3], table[3:].view(np.float64)),
    )


def _columns(ids: Ints, scores: Floats) -> dict[str, Any]:
    """The rows of two tables by the names of a ``TrainBatch``'s columns."""
    return {
        "sample_ids": ids[0],
        "group_ids": ids[1],
        "weight_versions": ids[2],
        "rewards": scores[0],
        "scalar_advantages": scores[1] if len(scores) > 1 else None,
    }


class Rows(Protocol):
    """A whole batch: what is planned of it, and its sequences, laid flat when they are asked for."""

    @property
    def lengths(self) -> Sequence[int]: ...

    @property
    def loss_tokens(self) -> Sequence[int]: ...

    @property
    def group_ids(self) -> Ints: ...

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> TrainBatch: ...


class MiniBatchPart(NamedTuple):
    """One optimizer step on one data-parallel rank.

    ``micro_batch_sizes``: sequences of each micro-batch, 0 for an empty one; every rank has the same number of them.
    ``num_loss_tokens`` and ``num_sequences`` are the plan's counts, over all ranks.
    """

    micro_batch_sizes: tuple[int, ...]
    num_loss_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchPart:
    """What one data-parallel rank holds of a batch: its rows, in the order of its micro-batches, and what it must know of all.

    ``group_ids`` int64 are those of every sequence of the whole batch, by sample id. A rank whose ``samples`` are the sample
    ids 4 0 and 3, with ``mini_batches`` of sizes (2, 0) and (1, 0), runs 4 and 0 together, then nothing; then 3, then nothing.
    """

    dp_rank: int
    samples: TrainBatch
    mini_batches: tuple[MiniBatchPart, ...]
    group_ids: Ints

    def __reduce__(self) -> tuple[Any, ...]:
        return _part_from_buffers, (self.dp_rank, self.samples, self.mini_batches, PickleBuffer(self.group_ids))


def _part_from_buffers(dp_rank: int, samples: TrainBatch, mini_batches: tuple[MiniBatchPart, ...], group_ids: Any) -> BatchPart:
    ids = np.frombuffer(group_ids, np.int64)
    return BatchPart(dp_rank=dp_rank, samples=samples, mini_batches=mini_batches, group_ids=ids)
