"""Log-probs and entropy over a vocabulary that is split over tensor-parallel ranks.

The logits of all tokens never exist at once: hidden states meet the output weight in chunks of tokens, forward and again
backward, and only per-token numbers (maximum, sum of exponentials, ...) cross the ranks, in one all-reduce a pass.
Legend: T tokens, D hidden size, v vocabulary rows of this rank (padding included).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Of fp32 logits. On a CPU about 450 tokens of a 152k vocabulary on one rank; a GPU wants fewer, larger products.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabShard:
    """Which vocabulary rows this rank holds: ``first`` row's id, and how many of its rows are real (not padding)."""

    group: ProcessGroup
    first: int
    num_real: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitScaling:
    """From the output layer's products x to logits: c * tanh(x / c) with ``softcap`` c (none when None), then divided by
    ``temperature``. ``fp32``: products of bf16 numbers are kept in fp32, not rounded to bf16 (steps of 0.125 around 20)."""

    temperature: float = 1.0
    softcap: float | None = None
    fp32: bool = False

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


def _chunks(num_tokens: int, weight: Tensor) -> Iterator[slice]:
    """Runs of tokens whose fp32 logits fit ``CHUNK_BYTES`` of the weight's device."""
    size = max(1, CHUNK_BYTES[weight.device.type] // (4 * max(1, weight.shape[0])))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _output_layer(weight: Tensor, fp32: bool) -> Callable[[Tensor], Tensor]:
    """Hidden states [n, D] to products [n, v], in fp32 or in the weight's type."""
    if not fp32 or weight.dtype == torch.float32:
        return lambda hidden: torch.matmul(hidden, weight.t())
    if weight.is_cuda:
        # The sums are in fp32 inside the kernel whatever its output; only that output is wider.
        return lambda hidden: torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    # No such kernel on CPUs. Products of bf16 numbers are exact in fp32, so the two ways differ by the order of sums.
    wide = weight.float()
    return lambda hidden: torch.matmul(hidden.float(), wide.t())


def _logits(products: Tensor, num_real: int, scaling: LogitScaling) -> Tensor:
    logits = scaling.apply(products.float())
    if num_real < products.shape[1]:
        logits[:, num_real:] = -torch.inf
    return logits


def _sums(products: Tensor, num_real: int, scaling: LogitScaling) -> tuple[Tensor, Tensor, Tensor]:
    """Per token, over this rank's rows z: top = max z, sum e^(z - top) and sum e^(z - top) (z - top)."""
    logits = _logits(products, num_real, scaling)
    # A rank of padding rows alone has maximum -inf; a finite stand-in keeps exp(-inf - x) = 0 instead of nan.
    top = logits.max(dim=-1).values.clamp_min(torch.finfo(torch.float32).min)
    shifted = logits.sub_(top[:, None])
    exp = shifted.exp()
    return top, exp.sum(-1), (exp * shifted.masked_fill_(exp == 0, 0)).sum(-1)


def _slopes(
    products: Tensor,
    num_real: int,
    scaling: LogitScaling,
    per_token: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The gradient at ``products``, as ``dtype``. ``per_token``: the label's row (-1: on another rank), logsumexp,
    entropy, and the gradients of log-prob and entropy."""
    label, logsumexp, entropy, grad_logprob, grad_entropy = (column[:, None] for column in per_token)
    logits = _logits(products, num_real, scaling)
    logprobs = logits - logsumexp
    probs = logprobs.exp()
    # d entropy / d logit = -p (log p + H); d logprob(label) / d logit = [label] - p
    slope = grad_logprob + grad_entropy * (logprobs.masked_fill_(probs == 0, 0) + entropy)
    grad = probs.mul_(slope).neg_()
    grad += torch.where(torch.arange(products.shape[1], device=products.device) == label, grad_logprob, 0.0)
    # Without the padding: its gradient is 0 already, and at its logit of -inf there is no slope.
    scaling.apply_backward(grad[:, :num_real], logits[:, :num_real])
    return grad.to(dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    def on_a_copy(products: Tensor, *rest: Any) -> Any:
        # Fused away. Without it, what the function does in place to fp32 products would be written back: a pass more.
        return function(products.clone(), *rest)

    return torch.compile(on_a_copy, dynamic=True)


def _for_device[F: Callable[..., Any]](function: F, device: torch.device) -> F:
    """On a GPU compiled: eager, each line of these functions is a pass over the logits, fused they are one or two."""
    return _compiled(function) if device.type == "cuda" else function  # type: ignore[return-value]


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, scaling: LogitScaling
    ) -> tuple[Tensor, Tensor]:
        top, sum_exp, sum_shifted, label_logit = (hidden.new_zeros(hidden.shape[0], dtype=torch.float32) for _ in range(4))
        local_label = labels - shard.first
        is_here = (local_label >= 0) & (local_label < shard.num_real)
        safe_label = torch.where(is_here, local_label, 0)
        sums = _for_device(_sums, hidden.device)
        output_layer = _output_layer(weight, scaling.fp32)
        for rows in _chunks(hidden.shape[0], weight):
            products = output_layer(hidden[rows])
            found = scaling.apply(products.gather(1, safe_label[rows, None]).squeeze(1).float())
            label_logit[rows] = torch.where(is_here[rows], found, 0.0)
            top[rows], sum_exp[rows], sum_shifted[rows] = sums(products, shard.num_real, scaling)
        if shard.group.size() > 1:
            own_top = top.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
            # Only a rank without real rows is so far below that the difference overflows; its sums are 0 anyway.
            down = (own_top - top).clamp_min(-1e4)
            scale = down.exp()
            totals = torch.stack([sum_exp * scale, (sum_shifted + down * sum_exp) * scale, label_logit])
            dist.all_reduce(totals, group=shard.group)
            sum_exp, sum_shifted, label_logit = totals.unbind()
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
        label = torch.where(is_here, safe_label, -1)
        slopes = _for_device(_slopes, hidden.device)
        output_layer = _output_layer(weight, ctx.scaling.fp32)
        for rows in _chunks(hidden.shape[0], weight):
            products = output_layer(hidden[rows])
            per_token = (label[rows], logsumexp[rows], entropy[rows], grad_logprob[rows], grad_entropy[rows])
            # In the weight's type, as every gradient that enters a matrix product; probabilities need no finer steps.
            grad = slopes(products, ctx.shard.num_real, ctx.scaling, per_token, weight.dtype)
            grad_hidden[rows] = torch.matmul(grad, weight)
            grad_weight += torch.matmul(grad.t(), hidden[rows])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None
