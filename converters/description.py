"""The description that makes item files a torch_dist checkpoint: which item of which file is which block of which tensor."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from converters.frames import frame
from converters.items import Item
from converters.places import GlobalTensor
from converters.skeleton import Skeleton
from rlx.models.hf.folder import torch_dtype

OBJECTS_FILE = "__0_objects.distcp"


def write_description(
    folder: Path, tensors: Mapping[str, GlobalTensor], files: Mapping[str, Sequence[Item]], skeleton: Skeleton
) -> None:
    """Fill the rooms of the files, write what the model stores beside tensors, ``.metadata`` and, last, ``metadata.json``."""
    described: dict[str, Any] = {
        key: TensorStorageMetadata(
            properties=TensorProperties(dtype=torch_dtype(tensor.dtype)), size=torch.Size(tensor.shape), chunks=[]
        )
        for key, tensor in tensors.items()
    }
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, items in files.items():
        with (folder / name).open("r+b", buffering=0) as stream:
            for item in items:
                position, length = frame(stream.fileno(), item, tensors[item.key].dtype)
                chunks = described[item.key].chunks
                offset = torch.Size(item.offset)
                places[MetadataIndex(item.key, offset, len(chunks))] = _StorageInfo(name, position, length)
                chunks.append(ChunkStorageMetadata(offsets=offset, sizes=torch.Size(item.shape)))
    # Under this key Megatron looks for what is not sharded.
    common = str(ShardedObject("common_state", None, (1,), (0,)).unique_key)
    objects = {common: {"content_metadata": dict(skeleton.content_metadata)}} | dict(skeleton.objects)
    with (folder / OBJECTS_FILE).open("wb") as stream:
        for key, value in objects.items():
            position = stream.tell()
            torch.save([value], stream)  # Megatron keeps an object as the list of its shards
            described[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(OBJECTS_FILE, position, stream.tell() - position)
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(Metadata(state_dict_metadata=described, storage_data=places), stream)
    save_config(CheckpointingConfig(sharded_backend="torch_dist"), str(folder))
