"""Weights of a Megatron distributed checkpoint (torch_dist) into chunks of any layout; and the choice of format by folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from rlx.arch.architecture import Architecture, is_megatron_checkpoint
from rlx.models.hf.io import load_hf
from rlx.models.hf.whole import check_manifest
from rlx.parallel.checkpoint import failures_named
from rlx.parallel.context import ParallelContext
from rlx.parallel.optimizer import content_metadata


def load_weights(chunks: Sequence[nn.Module], arch: Architecture, folder: str | Path, context: ParallelContext) -> None:
    """Fill the chunks from a Hugging Face folder or a Megatron checkpoint, whichever ``folder`` is. Collective."""
    if is_megatron_checkpoint(folder):
        load_megatron(chunks, Path(folder), context)
    else:
        load_hf(chunks, arch, folder, context)


def load_megatron(chunks: Sequence[nn.Module], folder: Path, context: ParallelContext, *, with_head: bool = False) -> None:
    """Fill the chunks from a checkpoint written under any layout. Collective. A value head keeps its start values, unless the
    checkpoint is of a model that has one (``with_head``).

    ValueError on missing or misshapen tensors and on files that are not as long as the converter left them, on every rank.
    """
    states = [_weights_of(chunk, with_head) for chunk in chunks]
    context.raise_together(_problem(folder, states))
    wanted = {f"chunk{index}": state for index, state in enumerate(states)}
    with failures_named(folder, "read"):
        loaded = dist_checkpointing.load(wanted, str(folder))
    for index, chunk in enumerate(chunks):
        _fill(chunk, loaded[f"chunk{index}"])


def _weights_of(chunk: nn.Module, with_head: bool) -> dict[str, Any]:
    """The chunk's sharded tensors. Objects (Transformer Engine's scaling state) stay as built, and so does a value head."""
    sharded: Mapping[str, Any] = chunk.sharded_state_dict(metadata=content_metadata())  # type: ignore[operator]
    state = chunk.state_dict(keep_vars=True)
    return {
        name: entry
        for name, entry in sharded.items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and (with_head or not _is_value_head(name, state))
    }


def _is_value_head(name: str, state: Mapping[str, Any]) -> bool:
    return name == "output_layer.bias" or (name == "output_layer.weight" and state[name].shape[0] == 1)


def _fill(chunk: nn.Module, loaded: Mapping[str, Any]) -> None:
    state = {name: value for name, value in loaded.items() if torch.is_tensor(value)}
    answer = chunk.load_state_dict(state, strict=False)
    own = chunk.state_dict(keep_vars=True)
    left = [name for name in answer.missing_keys if not name.endswith("_extra_state") and not _is_value_head(name, own)]
    assert not left and not answer.unexpected_keys, f"not filled: {left}; not known: {answer.unexpected_keys}"


def _problem(folder: Path, states: Sequence[Mapping[str, Any]]) -> ValueError | None:
    try:
        check_manifest(folder)
    except ValueError as error:
        return error
    stored: Mapping[str, ShardedTensor] = dist_checkpointing.load_tensors_metadata(str(folder))
    for entry in (entry for state in states for entry in state.values()):
        for piece in entry.build() if isinstance(entry, ShardedTensorFactory) else (entry,):
            if piece.key not in stored:
                return ValueError(f"{folder} has no tensor {piece.key}, which config.json implies")
            shape = tuple(stored[piece.key].global_shape)
            # Vocabularies are stored without the padding that a layout adds.
            if shape != tuple(piece.global_shape) and not piece.allow_shape_mismatch:
                return ValueError(f"{folder}: {piece.key} has shape {shape}, config.json implies {tuple(piece.global_shape)}")
    return None
