"""Cutting a rollout batch into mini-batches, data-parallel ranks and micro-batches: pure arithmetic on lengths.

Invariants (tests/unit/data/test_plan.py holds one test for each):

1. every sample appears exactly once;
2. within a mini-batch every rank has the same number of micro-batches, at least 1, and a multiple of pp when vpp > 1
   (Megatron's interleaved schedule needs that);
3. a micro-batch holds at most ``max_tokens`` tokens, padding counted, and ``max_patches`` of different images, unless it holds a
   single sample;
4. which samples form a mini-batch does not depend on the layout: they are cut in order, sizes differing by at most one;
5. samples are balanced over ranks: no two ranks differ by more than the longest padded sample of the mini-batch (with images:
   than the one of most work, tokens and patches);
6. fewer samples than ranks are allowed: the rest get empty micro-batches;
7. the same input gives the same plan;
8. ``num_loss_tokens`` and ``num_sequences`` (those with tokens to learn from) count the whole mini-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import pairwise
from typing import Self

from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import sizes_of
from rlx.config.schema import BatchingConfig, ModelConfig, ParallelConfig
from rlx.types.layout import BatchPlan, MiniBatchPlan, ParallelDims
from rlx.types.rollout import ImageSpan
from rlx.types.train_batch import BatchPart, MiniBatchPart, Rows


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``number``."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a micro-batch may hold and what images cost.

    max_tokens   tokens, padding counted
    max_patches  patches of different images; None: no limit of their own
    patch_cost   how many tokens take as long as the tower's work on a patch
    """

    max_tokens: int
    max_patches: int | None = None
    patch_cost: float = 0.0

    @classmethod
    def of(cls, model: ModelConfig, parallel: ParallelConfig, batching: BatchingConfig) -> Self:
        """As a configuration says, on ranks that share out the text model but have the whole tower each."""
        sizes = sizes_of(read_architecture(model.path))
        return cls(
            max_tokens=batching.max_tokens_per_micro_batch,
            max_patches=batching.max_patches_per_micro_batch,
            patch_cost=sizes.patch_cost(parallel.tp * parallel.pp, learns=model.vision == "train"),
        )

    def load_of(self, images: Sequence[Sequence[ImageSpan]]) -> ImageLoad | None:
        """The images of each sample under this budget; None where no sample has any."""
        if not any(images):
            return None
        patches = [{span.key: math.prod(span.grid) for span in of_one} for of_one in images]
        return ImageLoad(patches=patches, max_patches=self.max_patches, patch_cost=self.patch_cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLoad:
    """``patches[i]`` are those of each image of sample i, by its key; the rest as in ``Budget``."""

    patches: Sequence[Mapping[str, int]]
    max_patches: int | None
    patch_cost: float

    def cost(self, index: int) -> int:
        """The tower's work on the images of a sample, in tokens."""
        return round(self.patch_cost * sum(self.patches[index].values()))

    def fits(self, indices: Iterable[int]) -> bool:
        """Whether these samples may be in one micro-batch."""
        together = {key: count for index in indices for key, count in self.patches[index].items()}
        return self.max_patches is None or sum(together.values()) <= self.max_patches


def plan_batch(
    lengths: Sequence[int],
    loss_tokens: Sequence[int],
    *,
    dims: ParallelDims,
    num_mini_batches: int,
    max_tokens: int,
    images: ImageLoad | None = None,
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
    if images is not None:
        _check_patches(images)
    mini_batches = []
    for members in _cut_in_order(len(lengths), num_mini_batches):
        micro_batches = _plan_ranks(members, lengths, dims, max_tokens, images)
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


def _check_patches(images: ImageLoad) -> None:
    most = max((sum(patches.values()) for patches in images.patches), default=0)
    if images.max_patches is not None and most > images.max_patches:
        raise ValueError(
            f"the images of a sample have {most} patches, more than batching.max_patches_per_micro_batch = {images.max_patches};"
            f" raise it to at least {most}, or use smaller images"
        )


def _plan_ranks(
    members: Sequence[int], lengths: Sequence[int], dims: ParallelDims, max_tokens: int, images: ImageLoad | None
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    padded = {index: round_up(lengths[index], dims.sequence_multiple) for index in members}
    work = padded if images is None else {index: size + images.cost(index) for index, size in padded.items()}
    capacity = max_tokens - max_tokens % dims.pack_multiple  # whatever is rounded up fits in exactly when it fits in this
    per_rank = [_pack(rank, padded, capacity, images) for rank in _balance(work, dims.dp)]
    num_micro_batches = max(1, *(len(packs) for packs in per_rank))
    if dims.vpp > 1:
        num_micro_batches = round_up(num_micro_batches, dims.pp)
    return tuple(_spread(packs, work, num_micro_batches) for packs in per_rank)


def _largest_first(indices: Sequence[int], sizes: dict[int, int]) -> list[int]:
    return sorted(indices, key=lambda index: (-sizes[index], index))


def _balance(work: dict[int, int], num_ranks: int) -> list[list[int]]:
    """The sample of most work first, each to the rank with the least so far."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap
    for index in _largest_first(list(work), work):
        load, rank = loads[0]
        ranks[rank].append(index)
        heapreplace(loads, (load + work[index], rank))
    return ranks


def _pack(indices: Sequence[int], padded: dict[int, int], capacity: int, images: ImageLoad | None) -> list[list[int]]:
    """First fit, longest first. A sample whose padding alone exceeds the budget gets a micro-batch of its own."""
    packs: list[list[int]] = []
    loads: list[int] = []
    for index in _largest_first(indices, padded):
        size = padded[index]
        fitting = (pack for pack, load in enumerate(loads) if load + size <= capacity)
        if images is not None:
            fitting = (pack for pack in fitting if images.fits([*packs[pack], index]))
        pack = next(fitting, None)
        if pack is None:
            packs.append([index])
            loads.append(size)
        else:
            packs[pack].append(index)
            loads[pack] += size
    return packs


def _spread(packs: list[list[int]], work: dict[int, int], num_micro_batches: int) -> tuple[tuple[int, ...], ...]:
    """Halve the heaviest divisible pack until there are enough; then fill up with empty ones."""
    packs = list(packs)
    while len(packs) < num_micro_batches:
        divisible = [pack for pack in packs if len(pack) > 1]
        if not divisible:
            packs.append([])
            continue
        heaviest = max(divisible, key=lambda pack: sum(work[index] for index in pack))
        packs.remove(heaviest)
        packs += [heaviest[::2], heaviest[1::2]]
    packs.sort(key=lambda pack: (-sum(work[index] for index in pack), pack))
    return tuple(tuple(sorted(pack)) for pack in packs)
