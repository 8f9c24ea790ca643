"""One rank's view of a rollout batch: its packs, and the columns computed for its samples.

Columns are held by sample id, whole sequences (context parallelism undone), on the last pipeline stage only. They live from
``load_batch`` to the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from rlx.data.collate import Ragged, collate, split_columns
from rlx.parallel.context import ParallelContext
from rlx.parallel.context_parallel import gather_pack
from rlx.parallel.packing import LocalBatch, PackSizes
from rlx.types.batch import Columns, MicroBatch
from rlx.types.train_batch import BatchPart, MiniBatchPart, TrainSample


class RankBatch:
    """The samples of this data-parallel rank, in the order of their micro-batches, which are lengthened to ``sizes``."""

    def __init__(self, part: BatchPart, context: ParallelContext, sizes: PackSizes | None = None) -> None:
        assert part.dp_rank == context.dp_rank, f"data-parallel rank {context.dp_rank} was sent the part of {part.dp_rank}"
        self.columns: Columns[Ragged] = Columns()
        self.samples = list(part.samples)
        self.group_ids: list[int] = part.group_ids.tolist()
        self._mini_batches, self._context, self._sizes = part.mini_batches, context, sizes
        self._kept_features: dict[tuple[int, str], Tensor] = {}

    def counts(self, mini_batch: int) -> MiniBatchPart:
        """What the mini-batch has to learn from, over all ranks."""
        return self._mini_batches[mini_batch]

    def packs(self, mini_batch: int) -> list[MicroBatch]:
        """The micro-batches of one mini-batch, with every column computed so far."""
        start = sum(sum(before.micro_batch_sizes) for before in self._mini_batches[:mini_batch])
        borders = accumulate(self._mini_batches[mini_batch].micro_batch_sizes, initial=start)
        return [self._pack(self.samples[first:last]) for first, last in pairwise(borders)]

    def all_packs(self) -> list[MicroBatch]:
        """The micro-batches of all mini-batches, in order."""
        return [pack for index in range(len(self._mini_batches)) for pack in self.packs(index)]

    def _pack(self, chosen: Sequence[TrainSample]) -> MicroBatch:
        pack = collate(chosen, [sample.sample_id for sample in chosen], self._context.dims, self.columns)
        return replace(pack if self._sizes is None else self._sizes.pad(pack), kept_features=self._kept_features)

    def whole(self, outputs: Iterable[tuple[LocalBatch, Tensor]]) -> Ragged:
        """Per-token results [t] of a forward pass as a column: sequences whole again, on the host."""
        column: dict[int, Tensor] = {}
        for batch, values_t in outputs:
            values_T = gather_pack(values_t.float(), batch.packed_seq_params.cu_seqlens_q, self._context.groups.cp)
            column.update(split_columns(values_T.cpu(), batch.pack))
        return column


def of_sample(column: Ragged | None, sample: TrainSample) -> Tensor:
    """The sample's part [L] of a column that is there."""
    assert column is not None, "the column has not been computed yet"
    return column[sample.sample_id]


def position_mask(sample: TrainSample) -> Tensor:
    """1 where the NEXT token is a response token, float32 [L]."""
    return _one_to_the_left(sample.loss_mask)


def position_rollout_logprobs(sample: TrainSample) -> Tensor:
    """The engine's log-prob of the next token, float32 [L]."""
    return _one_to_the_left(sample.rollout_logprobs)


def _one_to_the_left(column: NDArray[Any]) -> Tensor:
    shifted_L = torch.zeros(len(column))
    shifted_L[:-1] = torch.from_numpy(column[1:])
    return shifted_L
