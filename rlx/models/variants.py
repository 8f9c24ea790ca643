"""What a family's layers do beyond Llama's, put into Megatron's layer specification.

Each variant works with Megatron's own linear layers and with Transformer Engine's; core attention is theirs unless
Transformer Engine cannot compute what the family asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from rlx.arch.architecture import Architecture
from rlx.models.layers import CoreAttention, RMSNorm

Join = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class NormThenAdd(RMSNorm):
    """Stands where Megatron adds a sub-layer's output to the residual stream: the output is normed first."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Join:  # type: ignore[override]
        def join(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_and_bias
            output = output if bias is None else output + bias
            # Megatron calls this with gradients on even while scoring, which would keep every layer's activations alive.
            # The output was made in the caller's mode; the residual says nothing (what a pipeline receives asks for a gradient).
            with torch.set_grad_enabled(output.requires_grad):
                return residual + super(NormThenAdd, self).forward(output)

        return join


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


def adapt_layer(layer: ModuleSpec, arch: Architecture, config: TransformerConfig) -> None:
    """Change a layer's specification in place to what ``arch`` asks for."""
    attention = layer.submodules.self_attention.submodules
    if attention.core_attention is CoreAttention or needs_own_attention(arch, config):
        attention.core_attention = partial(CoreAttention, softcap=arch.attention_softcap)
    if arch.projection_bias:
        attention.linear_proj = _with_own_bias(attention.linear_proj)
    if arch.mlp_bias:
        mlp: MLPSubmodules = layer.submodules.mlp.keywords["submodules"]
        mlp.linear_fc1, mlp.linear_fc2 = _with_bias(mlp.linear_fc1), _with_own_bias(mlp.linear_fc2)
    if arch.post_norms:
        layer.submodules.self_attn_bda = ModuleSpec(module=NormThenAdd, params={"config": config})
        layer.submodules.mlp_bda = ModuleSpec(module=NormThenAdd, params={"config": config})


def needs_own_attention(arch: Architecture, config: TransformerConfig) -> bool:
    """Transformer Engine's configuration knows no soft-capping, and no windows over packed sequences that are split over
    context-parallel ranks."""
    return arch.attention_softcap is not None or (arch.window is not None and config.context_parallel_size > 1)


def _with_bias(builder: Callable[..., nn.Module], **more: Any) -> Callable[..., nn.Module]:
    """Megatron's configuration gives all linear layers biases or none; this one gets one."""

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        return builder(*args, **kwargs | more | {"bias": True})

    return build


# The layer adds its bias itself. Handed on for a later addition, as Megatron does, the parameter would become an output of
# the recomputed block, and its gradient would run through that block again without end.
_with_own_bias = partial(_with_bias, skip_bias_add=False)


def scale_embeddings(embedding: nn.Module, scale: float, dtype: torch.dtype) -> None:
    """Multiply what ``embedding`` gives by ``scale``, rounded to ``dtype`` as Hugging Face rounds it."""
    rounded = float(torch.tensor(scale, dtype=dtype, device="cpu"))  # also where the model is built on no device

    def multiply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * rounded

    embedding.register_forward_hook(multiply)
