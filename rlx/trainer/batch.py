"""One rank's view of a rollout batch: its packs, and the columns computed for its samples.

Columns are held by sample id, whole sequences (context parallelism undone), on the last pipeline stage only. They live from
``load_batch`` to the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rlx.data.collate import Ragged, collate, split_columns
from rlx.parallel.context import ParallelContext
from rlx.parallel.context_parallel import gather_pack
from rlx.parallel.packing import LocalBatch
from rlx.types.batch import Columns, MicroBatch
from rlx.types.layout import BatchPlan
from rlx.types.rollout import TrainSample


class RankBatch:
    """The samples that the plan gives to this data-parallel rank."""

    def __init__(self, samples: Sequence[TrainSample], plan: BatchPlan, context: ParallelContext) -> None:
        self.plan = plan
        self.columns: Columns[Ragged] = Columns()
        self._context = context
        self._samples = list(samples)
        mine = [ids for part in plan.mini_batches for ids in part.micro_batches[context.dp_rank]]
        self.samples = [self._samples[index] for ids in mine for index in ids]

    @property
    def everyone(self) -> list[TrainSample]:
        """The samples of all ranks, in order; sample ids are their indices."""
        return self._samples

    def members(self, mini_batch: int) -> list[TrainSample]:
        """The samples of one mini-batch over all ranks."""
        ranks = self.plan.mini_batches[mini_batch].micro_batches
        return [self._samples[index] for rank in ranks for ids in rank for index in ids]

    def packs(self, mini_batch: int) -> list[MicroBatch]:
        """The micro-batches of one mini-batch, with every column computed so far."""
        micro_batches = self.plan.mini_batches[mini_batch].micro_batches[self._context.dp_rank]
        return [self._pack(ids) for ids in micro_batches]

    def all_packs(self) -> list[MicroBatch]:
        """The micro-batches of all mini-batches, in order."""
        return [pack for index in range(len(self.plan.mini_batches)) for pack in self.packs(index)]

    def _pack(self, indices: Sequence[int]) -> MicroBatch:
        chosen = [self._samples[index] for index in indices]
        return collate(chosen, [sample.sample_id for sample in chosen], self._context.dims, self.columns)

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
    return torch.tensor((*sample.loss_mask[1:], 0), dtype=torch.float32)


def position_rollout_logprobs(sample: TrainSample) -> Tensor:
    """The engine's log-prob of the next token, float32 [L]."""
    return torch.tensor((*sample.rollout_logprobs[1:], 0.0), dtype=torch.float32)
