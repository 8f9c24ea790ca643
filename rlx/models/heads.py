"""What is computed at the end of a forward pass: log-probs and entropy of the given tokens, or values.

Each function is a ``Head`` of ``rlx.parallel.schedule``: called on every pipeline stage, it passes hidden states on
until the last one. Legend: t tokens of this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from rlx.arch.architecture import Architecture
from rlx.arch.weights import padded_vocab_size
from rlx.models.rotary import rotated_as_one
from rlx.models.vision import embedded
from rlx.parallel.context import ParallelContext
from rlx.parallel.packing import LocalBatch
from rlx.parallel.vocab import LogitScaling, logprobs_and_entropy, vocab_shard

Processor = Callable[..., Tensor]


def _run(chunk: nn.Module, batch: LocalBatch, processor: Processor | None) -> Tensor:
    (model,) = unwrap_model([chunk])
    output: Tensor = chunk(
        batch.tokens_1t,
        batch.positions_1t,
        None,
        decoder_input=embedded(model, batch),
        packed_seq_params=rotated_as_one(model, batch.packed_seq_params),
        output_processor=processor,
    )
    return output


def token_head(
    context: ParallelContext, arch: Architecture, temperature: float = 1.0, *, fp32: bool = False
) -> Callable[[nn.Module, LocalBatch], Tensor]:
    """A head that gives [2, t]: log-probs of ``labels_t`` and entropy. ``fp32``: see ``model.fp32_head``."""
    tp = context.groups.tp
    shard = vocab_shard(tp, padded_vocab_size(arch.vocab_size, context.dims.tp), arch.vocab_size)
    scaling = LogitScaling(temperature=temperature, softcap=arch.final_softcap, fp32=fp32)

    def head(chunk: nn.Module, batch: LocalBatch) -> Tensor:
        def process(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, config: Any, **_: Any) -> Tensor:
            if config.sequence_parallel:
                hidden_tD = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=tp)
            else:
                hidden_tD = copy_to_tensor_model_parallel_region(hidden_states, group=tp)
            weight = output_layer.weight if output_weight is None else output_weight
            return torch.stack(logprobs_and_entropy(hidden_tD.squeeze(1), weight, batch.labels_t, shard, scaling))

        return _run(chunk, batch, process)

    return head


def value_head(chunk: nn.Module, batch: LocalBatch) -> Tensor:
    """A head that gives values, float32 [t]."""

    def process(*, hidden_states: Tensor, output_layer: Any, **_: Any) -> Tensor:
        values: Tensor = output_layer(hidden_states)[0]
        return values[:, 0, 0]

    return _run(chunk, batch, process)
