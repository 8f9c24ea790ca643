"""Log-probs and entropy over a vocabulary that is split over tensor-parallel ranks.

The logits of all tokens never exist at once: hidden states meet the output weight in chunks of tokens, forward and again
backward, and only per-token numbers (maximum, sum of exponentials, ...) cross the ranks, in one all-reduce a pass.
Legend: T tokens, D hidden size, v vocabulary rows of this rank (padding included).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_BYTES = 256 * 2**20  # of fp32 logits: about 450 tokens of a 152k vocabulary on one rank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabShard:
    """Which vocabulary rows this rank holds: ``first`` row's id, and how many of its rows are real (not padding)."""

    group: ProcessGroup
    first: int
    num_real: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitScaling:
    """From the output layer's products x to logits: c * tanh(x / c) with ``softcap`` c (none when None), then divided by
    ``temperature``."""

    temperature: float = 1.0
    softcap: float | None = None

    def apply(self, products: Tensor) -> Tensor:
        """The logits; may overwrite ``products``."""
        if self.softcap is not None:
            products = products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products.div_(self.temperature) if self.temperature != 1.0 else products

    def apply_backward(self, grad: Tensor, logits: Tensor) -> None:
        """Turn the gradient at ``logits`` into that at the products, in place."""
        if self.softcap is not None:
            # tanh' = 1 - tanh^2
            grad *= (logits * (self.temperature / self.softcap)).square_().neg_().add_(1.0)
        if self.temperature != 1.0:
            grad /= self.temperature


PLAIN = LogitScaling()


def vocab_shard(group: ProcessGroup, padded_vocab_size: int, vocab_size: int) -> VocabShard:
    """The rows of the calling rank; padding rows are the last ones of the last ranks."""
    rows = padded_vocab_size // group.size()
    first = group.rank() * rows
    return VocabShard(group=group, first=first, num_real=max(0, min(rows, vocab_size - first)))


def logprobs_and_entropy(
    hidden_TD: Tensor, weight_vD: Tensor, labels_T: Tensor, shard: VocabShard, scaling: LogitScaling = PLAIN
) -> tuple[Tensor, Tensor]:
    """log p(label) and entropy of softmax(scaling(hidden @ weight.T)), float32 [T] each, on every rank.

    ``hidden_TD`` must carry the tensor-parallel gradient rule already (its gradient here is this rank's share, to be
    summed over the group by the region the caller took it from). Padding rows get no probability.
    """
    logprobs_T, entropy_T = _VocabParallel.apply(hidden_TD, weight_vD, labels_T, shard, scaling)  # type: ignore[no-untyped-call]
    return logprobs_T, entropy_T


def _chunks(num_tokens: int, num_rows: int) -> Iterator[slice]:
    """Runs of tokens whose fp32 logits fit ``CHUNK_BYTES``."""
    size = max(1, CHUNK_BYTES // (4 * max(1, num_rows)))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _logits(hidden: Tensor, weight: Tensor, shard: VocabShard, scaling: LogitScaling) -> Tensor:
    logits = scaling.apply(torch.matmul(hidden, weight.t()).float())
    if shard.num_real < weight.shape[0]:
        logits[:, shard.num_real :] = -torch.inf
    return logits


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, scaling: LogitScaling
    ) -> tuple[Tensor, Tensor]:
        # Per token, over this rank's rows z: top = max z, sum_exp = sum e^(z - top), sum_shifted = sum e^(z - top) (z - top).
        # Shifted sums keep their digits where raw logits are large.
        top, sum_exp, sum_shifted, label_logit = (hidden.new_zeros(hidden.shape[0], dtype=torch.float32) for _ in range(4))
        local_label = labels - shard.first
        is_here = (local_label >= 0) & (local_label < shard.num_real)
        safe_label = torch.where(is_here, local_label, 0)
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = _logits(hidden[rows], weight, shard, scaling)
            label_logit[rows] = torch.where(is_here[rows], logits.gather(1, safe_label[rows, None]).squeeze(1), 0.0)
            # A rank of padding rows alone has maximum -inf; a finite stand-in keeps exp(-inf - x) = 0 instead of nan.
            top[rows] = logits.max(dim=-1).values.clamp_min(torch.finfo(torch.float32).min)
            shifted = logits.sub_(top[rows, None])
            exp = shifted.exp()
            sum_exp[rows] = exp.sum(-1)
            sum_shifted[rows] = (exp * shifted.masked_fill_(exp == 0, 0)).sum(-1)
        if shard.group.size() > 1:
            own_top = top.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
            # Only a rank without real rows is so far below that the difference overflows; its sums are 0 anyway.
            down = (own_top - top).clamp_min(-1e4)
            scale = down.exp()
            sums = torch.stack([sum_exp * scale, (sum_shifted + down * sum_exp) * scale, label_logit])
            dist.all_reduce(sums, group=shard.group)
            sum_exp, sum_shifted, label_logit = sums.unbind()
        log_sum = sum_exp.log()
        entropy = log_sum - sum_shifted / sum_exp
        logsumexp = top + log_sum
        ctx.save_for_backward(hidden, weight, safe_label, is_here, logsumexp, entropy)
        ctx.shard, ctx.scaling = shard, scaling
        return label_logit - top - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_logprob, grad_entropy = grads
        hidden, weight, safe_label, is_here, logsumexp, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # Accumulated in fp32: a sum over many chunks would lose small gradients in bf16.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            logits = _logits(hidden[rows], weight, ctx.shard, ctx.scaling)
            logprobs = logits - logsumexp[rows, None]
            probs = logprobs.exp()
            # d entropy / d logit = -p (log p + H); d logprob(label) / d logit = [label] - p
            slope = grad_logprob[rows, None] + grad_entropy[rows, None] * (
                logprobs.masked_fill_(probs == 0, 0) + entropy[rows, None]
            )
            grad = probs.mul_(slope).neg_()
            grad.scatter_add_(1, safe_label[rows, None], (grad_logprob[rows] * is_here[rows])[:, None])
            # Without the padding: its gradient is 0 already, and at its logit of -inf there is no slope.
            ctx.scaling.apply_backward(grad[:, : ctx.shard.num_real], logits[:, : ctx.shard.num_real])
            grad = grad.to(weight.dtype)
            grad_hidden[rows] = torch.matmul(grad, weight)
            grad_weight += torch.matmul(grad.t(), hidden[rows])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None
