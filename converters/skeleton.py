"""Where each parameter lies in a Megatron checkpoint, asked of the model itself, built without data on the meta device.

The names and offsets are those of the model's own ``sharded_state_dict``, which has the last word over ``places``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from converters.places import Piece, Places
from rlx.arch.architecture import Architecture
from rlx.models.build import BuildOptions, build_model
from rlx.models.hf.io import slots
from rlx.parallel.context import ParallelContext, build_context, connect, shut_down
from rlx.parallel.optimizer import content_metadata
from rlx.types.layout import ParallelDims

_LEFT: list[ParallelContext] = []
"""Groups of worlds that were left: they take a tenth of a second to go, which the end of the process does without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """``objects`` are what the model stores beside tensors."""

    pieces: Places
    objects: Mapping[str, Any]
    content_metadata: Mapping[str, Any]


def skeleton(arch: Architecture) -> Skeleton:
    """The places of all parameters of ``arch``. Joins a world of one while it works."""
    with _world_of_one() as context, torch.device("meta"):
        chunks = build_model(arch, context, BuildOptions())
        state = chunks[0].sharded_state_dict(metadata=content_metadata())  # type: ignore[operator]
        own = chunks[0].state_dict(keep_vars=True)
        names = {id(value): name for name, value in own.items() if torch.is_tensor(value)}
        pieces = {
            slot.hf_names: tuple(_pieces(state[names[id(slot.parameter)]]))
            for slot in slots(chunks, arch, context)
            if not slot.is_tied_copy
        }
        objects = {entry.unique_key: entry.data for entry in state.values() if isinstance(entry, ShardedObject)}
    return Skeleton(pieces=pieces, objects=objects, content_metadata=content_metadata())


@contextmanager
def _world_of_one() -> Iterator[ParallelContext]:
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        connect(init_method=f"file://{folder}/store", rank=0, world_size=1, device=device, timeout_s=60)
        try:
            context = build_context(ParallelDims(world_size=1), device, seed=0, timeout_s=60)
            _LEFT.append(context)
            yield replace(context, device=torch.device("meta"))
        finally:
            shut_down()


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[Piece]:
    for stored in entry.build() if isinstance(entry, ShardedTensorFactory) else (entry,):
        count = stored.prepend_axis_num
        yield Piece(
            key=stored.key,
            global_shape=tuple(stored.global_shape),
            offset=tuple(stored.global_offset),
            shape=(1,) * count + tuple(stored.local_shape),
            num_prepended=count,
        )
