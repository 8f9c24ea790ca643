"""Runs micro-batches through Megatron's schedules (no pipeline, 1F1B, interleaved).

How losses are scaled: the caller's loss is a SUM over this rank's tokens. Here, and nowhere else, it is divided by the
mini-batch's global count, and Megatron's own scaling is switched off: with ``calculate_per_token_loss`` the schedules divide
by nothing and data parallelism adds gradients up, and a token count of zero makes ``finalize_model_grads`` divide by max(0,
1). The balancing losses of routers are divided by the mini-batch's loss tokens, however the caller's loss is aggregated
(``rlx.parallel.packing``), and enter the gradients inside the model, past Megatron's scaling. So no split over DP, CP, PP or
micro-batches can change a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from rlx.parallel.context import ParallelContext
from rlx.parallel.packing import LocalBatch, local_batch, pad_pack
from rlx.types.batch import LossOutput, MicroBatch

Head = Callable[[nn.Module, LocalBatch], Tensor]
"""Runs one model chunk; on the last stage returns per-token outputs, elsewhere hidden states."""

Loss = Callable[[Tensor, LocalBatch], LossOutput]
"""Turns the head's per-token outputs into a summed loss and statistics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divisors:
    """Counts of the whole mini-batch over all ranks: what the caller's loss is divided by, and its loss tokens, which divide
    the routers' balancing losses."""

    loss: float
    loss_tokens: float


def forward_backward(
    chunks: Sequence[nn.Module],
    packs: Sequence[MicroBatch],
    head: Head,
    loss: Loss,
    *,
    divisors: Divisors,
    context: ParallelContext,
) -> dict[str, Tensor]:
    """Gradients of sum(loss), and of the routers' balancing losses, over their divisors into the chunks' gradient buffers.
    Returns the summed statistics of this rank's micro-batches ([2]: sum, count; empty off the last stage)."""

    def step(batches: Iterator[LocalBatch], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], object]]:
        batch = next(batches)

        def finish(outputs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            result = loss(outputs, batch)
            no_tokens = torch.zeros((), dtype=torch.int, device=outputs.device)
            return result.loss / divisors.loss, no_tokens, {name: stat.detach() for name, stat in result.stats.items()}

        return head(chunk, batch), finish

    per_batch = _run(step, chunks, packs, context, num_loss_tokens=divisors.loss_tokens)
    totals: dict[str, Tensor] = {}
    for stats in per_batch:
        for name, stat in stats.items():
            totals[name] = totals.get(name, torch.zeros(2, dtype=torch.float64, device=stat.device)) + stat.double()
    return totals


def forward_only(
    chunks: Sequence[nn.Module], packs: Sequence[MicroBatch], head: Head, context: ParallelContext
) -> list[tuple[LocalBatch, Tensor]]:
    """The head's outputs of each micro-batch, on the last stage (empty elsewhere). No gradients."""

    def step(batches: Iterator[LocalBatch], chunk: nn.Module) -> tuple[Tensor, Callable[..., object]]:
        batch = next(batches)
        return head(chunk, batch), lambda outputs, non_loss_data: (batch, outputs)

    with torch.no_grad():
        return list(_run(step, chunks, packs, context, num_loss_tokens=None))


def _run(
    step: Callable[..., object],
    chunks: Sequence[nn.Module],
    packs: Sequence[MicroBatch],
    context: ParallelContext,
    *,
    num_loss_tokens: float | None,
) -> list:  # type: ignore[type-arg]
    """Without a number of tokens there is no backward pass."""
    longest = max(pack.tokens_T.shape[0] for pack in packs)
    if context.dims.vpp > 1:
        # The interleaved schedule exchanges tensors of one fixed shape.
        packs = [pad_pack(pack, longest) for pack in packs]
    batches = [local_batch(pack, context, num_loss_tokens or 1.0) for pack in packs]
    iterators = [iter(batches) for _ in chunks]
    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=longest,
        micro_batch_size=1,
        forward_only=num_loss_tokens is None,
        collect_non_loss_data=num_loss_tokens is None,
    )
    return results if context.is_last_stage else []
