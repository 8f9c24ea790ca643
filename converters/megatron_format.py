"""What Megatron itself says of a checkpoint: where each parameter of a model lies in it, and the description that makes item
files one. Import it after the device is settled: it imports Megatron.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from converters.items import Item
from converters.plan import GlobalTensor, Piece, Places
from rlx.arch.architecture import Architecture
from rlx.models.build import BuildOptions, build_model
from rlx.models.hf.folder import torch_dtype
from rlx.models.hf.io import slots
from rlx.parallel.context import ParallelContext, build_context, connect, shut_down
from rlx.parallel.optimizer import content_metadata
from rlx.types.layout import ParallelDims

OBJECTS_FILE = "__0_objects.distcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """``places`` are where the parameters lie, ``objects`` what the model stores beside tensors."""

    places: Places
    objects: Mapping[str, Any]


def skeleton(arch: Architecture) -> Skeleton:
    """What a model of ``arch`` stores and where, asked of its own ``sharded_state_dict`` on the meta device. Joins a world of one
    while it works."""
    with _world_of_one() as context, torch.device("meta"):
        chunks = build_model(arch, context, BuildOptions())
        state = chunks[0].sharded_state_dict(metadata=content_metadata())  # type: ignore[operator]
        own = chunks[0].state_dict(keep_vars=True)
        names = {id(value): name for name, value in own.items() if torch.is_tensor(value)}
        places = {
            slot.hf_names: tuple(_pieces(state[names[id(slot.parameter)]]))
            for slot in slots(chunks, arch, context)
            if not slot.is_tied_copy
        }
        objects = {entry.unique_key: entry.data for entry in state.values() if isinstance(entry, ShardedObject)}
    return Skeleton(places=places, objects=objects)


@contextmanager
def _world_of_one() -> Iterator[ParallelContext]:
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        connect(init_method=f"file://{folder}/store", rank=0, world_size=1, device=device, timeout_s=60)
        try:
            context = build_context(ParallelDims(world_size=1), device, seed=0, timeout_s=60)
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


def write_description(
    folder: Path, tensors: Mapping[str, GlobalTensor], files: Mapping[str, Sequence[Item]], skeleton: Skeleton
) -> None:
    """Write what the model stores beside tensors, ``.metadata`` and, last, ``metadata.json``."""
    described: dict[str, Any] = {
        key: TensorStorageMetadata(
            properties=TensorProperties(dtype=torch_dtype(tensor.dtype)), size=torch.Size(tensor.shape), chunks=[]
        )
        for key, tensor in tensors.items()
    }
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, items in files.items():
        for item in items:
            chunks = described[item.key].chunks
            offset = torch.Size(item.offset)
            places[MetadataIndex(item.key, offset, len(chunks))] = _StorageInfo(name, item.position, item.length)
            chunks.append(ChunkStorageMetadata(offsets=offset, sizes=torch.Size(item.shape)))
    # Under this key Megatron looks for what is not sharded.
    common = str(ShardedObject("common_state", None, (1,), (0,)).unique_key)
    objects = {common: {"content_metadata": content_metadata()}} | dict(skeleton.objects)
    with (folder / OBJECTS_FILE).open("wb") as stream:
        for key, value in objects.items():
            position = stream.tell()
            torch.save([value], stream)  # Megatron keeps an object as the list of its shards
            described[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(OBJECTS_FILE, position, stream.tell() - position)
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(Metadata(state_dict_metadata=described, storage_data=places), stream)
    save_config(CheckpointingConfig(sharded_backend="torch_dist"), str(folder))
