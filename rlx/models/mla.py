"""Multi-head latent attention in Megatron's terms: configuration fields and the attention module."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from rlx.arch.architecture import Architecture
from rlx.arch.latent import Latent
from rlx.models.layers import RMSNorm

LATENT_NORM_EPS = 1e-6


def latent_config(latent: Latent, arch: Architecture) -> dict[str, Any]:
    """Fields of Megatron's ``MLATransformerConfig``."""
    fields: dict[str, Any] = {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain_dim,
        "qk_pos_emb_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rotary_base": arch.rope_theta,
        "rope_type": "rope",
        # Megatron takes the factor into the scale of the scores under every rope type.
        "rotary_scaling_factor": 1.0,
    }
    if latent.yarn is None:
        return fields
    return fields | {
        "rope_type": "yarn",
        "rotary_scaling_factor": latent.yarn.factor,
        "original_max_position_embeddings": latent.yarn.original_max_positions,
        "beta_fast": latent.yarn.beta_fast,
        "beta_slow": latent.yarn.beta_slow,
        "mscale": latent.yarn.mscale,
        "mscale_all_dim": latent.yarn.mscale_all_dim,
    }


def attend_latently(layer: ModuleSpec) -> None:
    """Give the specification of a layer with Megatron's latent attention ours."""
    attention = layer.submodules.self_attention
    attention.module = LatentAttention
    if isinstance(attention.submodules.core_attention, partial):
        # Megatron's latent attention takes a class here, no builder; the families cap no scores.
        attention.submodules.core_attention = attention.submodules.core_attention.func


class LatentAttention(MLASelfAttention):
    """Megatron's latent attention with whole down projections on every rank, and norms where the families have them.

    Megatron's local layers split the down projections over tensor-parallel ranks and lose part of the rotary key's gradient,
    which every rank's heads feed; and without a query rank its choice of norms puts one in front of the query projection.
    Tensor parallelism needs sequence parallelism here: it is what adds up the down projections' gradients.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for name, size in (("linear_q_down_proj", config.q_lora_rank), ("linear_kv_down_proj", self._kv_size())):
            if isinstance(getattr(self, name, None), ColumnParallelLinear):
                setattr(self, name, WholeLinear(config, size))

    def _kv_size(self) -> int:
        return int(self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        linear = submodules.linear_q_proj
        return {
            "linear_q_proj": linear,
            "linear_q_up_proj": linear,
            "linear_kv_up_proj": linear,
            "q_layernorm": LatentNorm,
            "kv_layernorm": LatentNorm,
        }


class LatentNorm(RMSNorm):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = LATENT_NORM_EPS) -> None:
        super().__init__(config, hidden_size, LATENT_NORM_EPS)


class WholeLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole and applies to its part of the sequence."""

    def __init__(self, config: TransformerConfig, output_size: int) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(output_size, config.hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None
