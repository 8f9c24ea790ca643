"""Layers of the ``torch`` specification: norm and core attention that run anywhere, and the critic's value head.

They exist because Megatron's local layers refuse packed sequences, context parallelism and sequence parallelism
without Transformer Engine. Legend: t tokens of this rank, T tokens of the pack, H heads, G query groups, K head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from rlx.parallel.context_parallel import gather_pack_with_grad, local_index


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), normalised in fp32 as Hugging Face does.

    Zero-centred, it multiplies by 1 + weight, and rounds to the model's dtype after that instead of before (Gemma).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        # Under sequence parallelism each rank sees part of the tokens; Megatron sums gradients marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        if self.zero_centered:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return normed.to(x.dtype) * self.weight


class CoreAttention(nn.Module):
    """Causal attention over packed sequences, zigzag context parallelism included.

    Queries stay on their rank; keys and values are gathered over the context-parallel group. Sequences of equal length
    are attended in one batch. ``softcap`` c turns a score s into c * tanh(s / c) (Gemma Team 2024); a layer with a window
    lets a token see itself and the ``window_size[0]`` tokens before it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.group = pg_collection.cp
        self.scale = softmax_scale
        self.softcap = softcap
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.reach = config.window_size[0] if has_window else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams,
        **kwargs: Any,
    ) -> Tensor:
        """query [t, H, K], key and value [t, G, K] -> [t, H x K]."""
        cu_seqlens = packed_seq_params.cu_seqlens_q
        key = gather_pack_with_grad(key, cu_seqlens, self.group)
        value = gather_pack_with_grad(value, cu_seqlens, self.group)
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        cp = self.group.size()
        if (
            cp == 1
            and self.softcap is None
            and query.is_cuda
            and query.dtype != torch.float32
            and query.shape[-1] == value.shape[-1]
        ):
            return self._attend_flash(query, key, value, cu_seqlens, int(packed_seq_params.max_seqlen_q)).flatten(1)
        query_starts = (cu_seqlens[:-1] // cp).long()
        output = torch.zeros_like(query)
        for length in lengths.unique().tolist():
            if length == 0:
                continue
            chosen = (lengths == length).nonzero().squeeze(1)
            rows = cu_seqlens[chosen].long()[:, None] + torch.arange(length, device=query.device)
            query_rows = query_starts[chosen][:, None] + torch.arange(length // cp, device=query.device)
            output = output.index_put((query_rows,), self._attend(query[query_rows], key[rows], value[rows]))
        return output.flatten(1)

    def _attend_flash(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """The whole pack in one kernel, [t, H, K] (Dao 2023)."""
        window = (-1 if self.reach is None else self.reach, 0)
        heads = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(heads, dim=1) for x in (key, value))
        attended = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=self.scale, window_size=window)
        assert isinstance(attended, Tensor)  # a pair only when it is asked for
        return attended

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[n, length / cp, H, K] against [n, length, G, K]: n sequences of one length."""
        mask = self._mask(key.shape[1], key.device)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.softcap is not None:
            # Scores are as many as tokens squared: made again in the backward pass instead of kept.
            attended: Tensor = checkpoint(
                self._attend_capped, query, key, value, mask, use_reentrant=False, preserve_rng_state=False
            )
        else:
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )
        return attended.transpose(1, 2)

    def _mask(self, length: int, device: torch.device) -> Tensor | None:
        """Which keys each of this rank's queries of a sequence sees, bool [length / cp, length]; None where plain causal
        attention on one rank says it all."""
        window_bites = self.reach is not None and length > self.reach + 1
        if self.group.size() == 1 and not window_bites and self.softcap is None:
            return None
        borders = torch.tensor([0, length], device=device)
        distance = local_index(borders, self.group.size(), self.group.rank())[:, None] - torch.arange(length, device=device)
        return (distance >= 0) & (distance <= self.reach) if self.reach is not None else distance >= 0

    def _attend_capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """query [n, H, q, K], key and value [n, G, length, K] -> [n, H, q, K]; scores in fp32."""
        assert self.softcap is not None
        grouped = query.unflatten(1, (key.shape[1], -1))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2)).float() * scale
        scores = torch.tanh(scores / self.softcap) * self.softcap
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(value.dtype)
        return torch.matmul(weights, value.unsqueeze(2)).flatten(1, 2)


class ValueHead(nn.Module):
    """Hidden state to value, replicated over tensor-parallel ranks; stands where the output layer stood.

    Takes [t / tp, 1, D] under sequence parallelism, [t, 1, D] otherwise; gives [t, 1, 1] in fp32 on every rank.
    """

    bias: nn.Parameter | None

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection, seed: int, *, has_bias: bool = True) -> None:
        super().__init__()
        self.config, self.groups = config, groups
        device = torch.cuda.current_device()
        generator = torch.Generator().manual_seed(seed)
        # Small start values (Ziegler et al. 2019): a loud untrained critic would drown the reward.
        weight = torch.randn(1, config.hidden_size, generator=generator) / (config.hidden_size + 1)
        self.weight = nn.Parameter(weight.to(device=device, dtype=config.params_dtype))
        bias = nn.Parameter(torch.zeros(1, dtype=config.params_dtype, device=device)) if has_bias else None
        self.register_parameter("bias", bias)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        values = F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        if self.config.sequence_parallel:
            # Every rank computes the same loss from the gathered values, so the gradient is split, not summed.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self.groups.tp)
        return values, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, {}, sharded_offsets, tp_group=self.groups.tp, dp_cp_group=self.groups.dp_cp
        )
        return sharded
