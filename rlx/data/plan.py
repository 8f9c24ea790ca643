"""Cutting a rollout batch into mini-batches, data-parallel ranks and micro-batches: pure arithmetic on lengths.

Invariants (tests/unit/data/test_plan.py holds one test for each):

1. every sample appears exactly once;
2. within a mini-batch every rank has the same number of micro-batches, at least 1, and a multiple of pp when vpp > 1
   (Megatron's interleaved schedule needs that);
3. a micro-batch holds at most ``max_tokens`` tokens, padding counted, and ``max_patches`` of different images, unless it holds a
   single sample;
4. which samples form a mini-batch does not depend on the layout: they are cut in order, sizes differing by at most one;
5. work is balanced over ranks: no two ranks differ by more than the sample of most work (padded tokens, attention between them,
   patches), and within a rank over its micro-batches as far as the budget allows, of which there are as few as fit;
6. fewer samples than ranks are allowed: the rest get empty micro-batches;
7. the same input gives the same plan;
8. ``num_loss_tokens`` and ``num_sequences`` (those with tokens to learn from) count the whole mini-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import AttentionCost, sizes_of
from rlx.config.schema import BatchingConfig, ModelConfig, ParallelConfig
from rlx.data.balance import Room, deal, fewest_bins, pack
from rlx.types.layout import BatchPlan, MiniBatchPlan, ParallelDims
from rlx.types.rollout import ImageSpan
from rlx.types.train_batch import BatchPart, MiniBatchPart, Rows


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``number``."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a micro-batch may hold and what its parts cost.

    max_tokens   tokens, padding counted
    max_patches  patches of different images; None: no limit of their own
    patch_cost   how many tokens take as long as the tower's work on a patch
    attention    what attention between the tokens of a sequence costs; None: nothing
    """

    max_tokens: int
    max_patches: int | None = None
    patch_cost: float = 0.0
    attention: AttentionCost | None = None

    @classmethod
    def of(cls, model: ModelConfig, parallel: ParallelConfig, batching: BatchingConfig) -> Self:
        """As a configuration says, on ranks that share out the text model but have the whole tower each."""
        sizes = sizes_of(read_architecture(model.path))
        return cls(
            max_tokens=batching.max_tokens_per_micro_batch,
            max_patches=batching.max_patches_per_micro_batch,
            patch_cost=sizes.patch_cost(parallel.tp * parallel.pp, learns=model.vision == "train"),
            attention=sizes.attention_cost,
        )

    def load_of(self, lengths: Sequence[Sequence[int]], images: Sequence[Sequence[ImageSpan]] = ()) -> Load:
        """What samples are under this budget: the lengths of each one's sequences, and its images."""
        patches = [{span.key: math.prod(span.grid) for span in of_one} for of_one in images] if any(images) else []
        costs = [0.0] * len(lengths)
        if self.attention is not None:
            costs = [sum(map(self.attention.of, sequences)) for sequences in lengths]
        for index, of_one in enumerate(patches):
            costs[index] += self.patch_cost * sum(of_one.values())
        return Load(costs=list(map(round, costs)), patches=patches, max_patches=self.max_patches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """``costs[i]`` is the work on sample i beside that on its tokens one by one, in tokens: attention between them, the tower's
    on its images. ``patches[i]`` are those of each of its images, by its key; empty where no sample has any. ``max_patches`` as
    in ``Budget``."""

    costs: Sequence[int]
    patches: Sequence[Mapping[str, int]] = ()
    max_patches: int | None = None

    @property
    def is_limited(self) -> bool:
        """Whether images limit what may be together."""
        return bool(self.patches) and self.max_patches is not None

    def fits(self, indices: Iterable[int]) -> bool:
        """Whether the images of these samples may be in one micro-batch."""
        together = {key: count for index in indices for key, count in self.patches[index].items()}
        return self.max_patches is None or sum(together.values()) <= self.max_patches


def plan_batch(
    lengths: Sequence[int],
    loss_tokens: Sequence[int],
    *,
    dims: ParallelDims,
    num_mini_batches: int,
    max_tokens: int,
    load: Load | None = None,
) -> BatchPlan:
    """Plan samples with ``lengths[i]`` tokens, ``loss_tokens[i]`` of them trained on; see the module's invariants.

    With fewer samples than ``num_mini_batches`` there are fewer mini-batches (none is empty). Raises ValueError for a
    sample longer than ``max_tokens``, or numbers that make no sense.
    """
    if len(lengths) != len(loss_tokens):
        raise ValueError(f"{len(lengths)} lengths but {len(loss_tokens)} loss-token counts")
    if num_mini_batches < 1:
        raise ValueError(f"algorithm.num_mini_batches must be at least 1, got {num_mini_batches}")
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise ValueError(
            f"a sample of {longest} tokens does not fit batching.max_tokens_per_micro_batch = {max_tokens};"
            f" raise it to at least {longest}, or lower data.max_prompt_tokens or rollout.max_new_tokens"
        )
    load = Load(costs=[0] * len(lengths)) if load is None else load
    _check_patches(load)
    mini_batches = []
    for members in _cut_in_order(len(lengths), num_mini_batches):
        micro_batches = _plan_ranks(members, lengths, dims, max_tokens, load)
        learnt = [loss_tokens[index] for index in members]
        num_sequences = sum(1 for count in learnt if count)
        plan = MiniBatchPlan(micro_batches=micro_batches, num_loss_tokens=sum(learnt), num_sequences=num_sequences)
        mini_batches.append(plan)
    return BatchPlan(mini_batches=tuple(mini_batches))


def part_of(batch: Rows, plan: BatchPlan, dp_rank: int) -> BatchPart:
    """What data-parallel rank ``dp_rank`` gets of a planned batch."""
    mine = [mini_batch.micro_batches[dp_rank] for mini_batch in plan.mini_batches]
    parts = [
        MiniBatchPart(
            micro_batch_sizes=tuple(len(indices) for indices in micro_batches),
            num_loss_tokens=mini_batch.num_loss_tokens,
            num_sequences=mini_batch.num_sequences,
        )
        for micro_batches, mini_batch in zip(mine, plan.mini_batches, strict=True)
    ]
    rows = [index for micro_batches in mine for indices in micro_batches for index in indices]
    return BatchPart(dp_rank=dp_rank, samples=batch.rows(rows), mini_batches=tuple(parts), group_ids=batch.group_ids)


def _cut_in_order(num_samples: int, num_parts: int) -> list[range]:
    num_parts = min(num_parts, num_samples)
    borders = [part * num_samples // num_parts for part in range(num_parts + 1)] if num_parts else []
    return [range(start, end) for start, end in pairwise(borders)]


def _check_patches(load: Load) -> None:
    most = max((sum(patches.values()) for patches in load.patches), default=0)
    if load.max_patches is not None and most > load.max_patches:
        raise ValueError(
            f"the images of a sample have {most} patches, more than batching.max_patches_per_micro_batch = {load.max_patches};"
            f" raise it to at least {most}, or use smaller images"
        )


def _plan_ranks(
    members: Sequence[int], lengths: Sequence[int], dims: ParallelDims, max_tokens: int, load: Load
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    padded = {index: round_up(lengths[index], dims.sequence_multiple) for index in members}
    work = {index: size + load.costs[index] for index, size in padded.items()}
    capacity = max_tokens - max_tokens % dims.pack_multiple  # whatever is rounded up fits in exactly when it fits in this
    room = Room(sizes=padded, capacity=capacity, allows=load.fits if load.is_limited else None)
    ranks = deal(work, dims.dp)
    num_micro_batches = max(fewest_bins(rank, work, room) for rank in ranks)
    if dims.vpp > 1:
        num_micro_batches = round_up(num_micro_batches, dims.pp)
    return tuple(_in_order(pack(rank, work, room, num_micro_batches), work) for rank in ranks)


def _in_order(packs: list[list[int]], work: Mapping[int, int]) -> tuple[tuple[int, ...], ...]:
    """Those of most work first on every rank: what runs at the same time is of one size."""
    in_order = sorted(map(sorted, packs), key=lambda pack: (-sum(work[index] for index in pack), pack))
    return tuple(map(tuple, in_order))
