"""Packing samples into one micro-batch, and unpacking per-token results. The one place that shifts alignments.

Position t of a sequence predicts its token t + 1, so token-aligned columns move one to the left; the last position and
all padding predict nothing and have loss mask 0. The layout is the full one, before context parallelism cuts it.

Shape legend: T packed tokens, S sequences, L tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlx.types.batch import Columns, MicroBatch
from rlx.types.layout import ParallelDims
from rlx.types.train_batch import TrainSample

PADDING_ID = -1

Ragged = Mapping[int, Tensor]
"""A column of whole samples: position-aligned [L] tensors by sample id."""


def collate(
    samples: Sequence[TrainSample],
    sample_ids: Sequence[int],
    dims: ParallelDims,
    columns: Columns[Ragged] | None = None,
) -> MicroBatch:
    """Pack the samples named by ``sample_ids``, in that order; ``samples`` may hold more (a whole rollout batch).

    Each sequence is padded to ``dims.sequence_multiple``, the last one until the total is a multiple of
    ``dims.pack_multiple``. ``columns`` are laid into float32 [T]. Without
    sample ids the result is one masked padding sequence of at least 2 tokens, its id -1 and its length counted as true, so
    that attention over it is well defined. Raises ValueError for an unknown sample id or a column that does not fit.
    """
    by_id = {sample.sample_id: sample for sample in samples}
    unknown = [sample_id for sample_id in sample_ids if sample_id not in by_id]
    if unknown:
        raise ValueError(f"no samples with ids {unknown}")
    chosen = [by_id[sample_id] for sample_id in sample_ids]
    starts, cu_seqlens = _layout([len(sample) for sample in chosen] or [2], dims)
    num_tokens = cu_seqlens[-1]

    tokens_T, labels_T = torch.zeros(num_tokens, dtype=torch.int64), torch.zeros(num_tokens, dtype=torch.int64)
    loss_mask_T = torch.zeros(num_tokens)
    for start, sample in zip(starts, chosen, strict=False):
        length, tokens_L = len(sample), torch.from_numpy(sample.token_ids)
        tokens_T[start : start + length] = tokens_L
        labels_T[start : start + length - 1] = tokens_L[1:]
        loss_mask_T[start : start + length - 1] = torch.from_numpy(sample.loss_mask[1:])
    return MicroBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        loss_mask_T=loss_mask_T,
        cu_seqlens_S1=torch.tensor(cu_seqlens, dtype=torch.int32),
        lengths_S=torch.tensor([len(sample) for sample in chosen] or [num_tokens], dtype=torch.int64),
        sample_ids=tuple(sample_ids) or (PADDING_ID,),
        images=tuple(
            replace(span, start=start + span.start)
            for start, sample in zip(starts, chosen, strict=False)
            for span in sample.images
        ),
        columns=(columns or Columns()).map(lambda name, values: _lay_column(name, values, starts, chosen, num_tokens)),
    )


def split_columns(values_T: Tensor, micro_batch: MicroBatch) -> dict[int, Tensor]:
    """The inverse of laying a column: position-aligned [L] tensors by sample id, copied, padding dropped."""
    if values_T.shape[0] != micro_batch.tokens_T.shape[0]:
        raise ValueError(f"{values_T.shape[0]} values for a micro-batch of {micro_batch.tokens_T.shape[0]} tokens")
    starts, lengths = micro_batch.cu_seqlens_S1.tolist(), micro_batch.lengths_S.tolist()
    return {
        sample_id: values_T[start : start + length].clone()
        for sample_id, start, length in zip(micro_batch.sample_ids, starts, lengths, strict=False)
        if sample_id != PADDING_ID
    }


def _layout(lengths: Sequence[int], dims: ParallelDims) -> tuple[list[int], list[int]]:
    """Starts [S] and borders [S + 1]; both multiples agree because pack_multiple is one of sequence_multiple."""
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + -(-length // dims.sequence_multiple) * dims.sequence_multiple)
    borders[-1] = -(-borders[-1] // dims.pack_multiple) * dims.pack_multiple
    return borders[:-1], borders


def _lay_column(name: str, values: Ragged, starts: Sequence[int], chosen: Sequence[TrainSample], num_tokens: int) -> Tensor:
    column_T = torch.zeros(num_tokens)
    for start, sample in zip(starts, chosen, strict=False):
        if sample.sample_id not in values:
            raise ValueError(f"column {name} has nothing for sample {sample.sample_id}")
        value_L, length = values[sample.sample_id], len(sample)
        if value_L.shape != (length,):
            raise ValueError(f"column {name}, sample {sample.sample_id}: shape {tuple(value_L.shape)}, expected ({length},)")
        column_T[start : start + length] = value_L
    return column_T
