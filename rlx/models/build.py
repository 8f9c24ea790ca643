"""Builds Megatron models: the one place that knows which Megatron class and which layer specification is used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from rlx.arch.architecture import Architecture
from rlx.arch.layout import layout_problems
from rlx.arch.longrope import LongRope
from rlx.arch.weights import padded_vocab_size
from rlx.models.frequencies import LongRotary, inverse_frequencies
from rlx.models.layers import CoreAttention, RMSNorm, ValueHead
from rlx.models.mla import attend_latently, latent_config
from rlx.models.moe import expert_fields, route
from rlx.models.pipeline import megatron_layout
from rlx.models.rotary import GridRotary, PackRotary
from rlx.models.variants import ACTIVATION_FUNCTIONS, adapt_layer, scale_embeddings
from rlx.models.vision import Files, add_tower
from rlx.parallel.context import ParallelContext, stage_of_chunk
from rlx.types.precision import FP32, Precision
from rlx.types.weights import torch_dtype

HeadKind = Literal["token", "value", "score"]
"""Log-probs of tokens; values of tokens (a critic); or a sequence's score (a reward model: values without a bias)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to compute, as opposed to what: see the configuration keys of the same names. ``images`` gives the file of
    an image by its key; None where there are none."""

    precision: Precision = FP32
    layer_spec: str = "auto"
    recompute: str = "none"
    recompute_layers: int | None = None
    seed: int = 0
    moe_aux_loss_coefficient: float = 0.0
    moe_z_loss_coefficient: float = 0.0
    vision: str = "frozen"
    images: Files | None = None


def resolve_layer_spec(options: BuildOptions, device: torch.device) -> str:
    """``auto`` takes Transformer Engine for bf16 on a GPU that has it. ValueError when it was asked for and cannot be used."""
    setting, usable = options.layer_spec, device.type == "cuda" and options.precision.name == "bf16" and HAVE_TE
    if setting == "auto":
        return "transformer_engine" if usable else "torch"
    if setting == "transformer_engine" and not usable:
        # Its attention over packed sequences has no fp32 kernel.
        raise ValueError(
            "model.layer_spec=transformer_engine needs a GPU, model.dtype=bf16 and the packages transformer-engine and"
            " transformer-engine-torch"
        )
    return setting


def megatron_config(arch: Architecture, context: ParallelContext, options: BuildOptions) -> TransformerConfig:
    """Megatron's configuration of ``arch`` under the context's layout. Collective scaling is explained in
    ``rlx.parallel.schedule``."""
    dims, dtype = context.dims, torch_dtype(options.precision.torch_name)
    on_gpu = context.device.type == "cuda"
    for dimension, problem in layout_problems(arch, dims):
        raise ValueError(f"parallel.{dimension}: {problem}")
    with_engine = resolve_layer_spec(options, context.device) == "transformer_engine"
    config_class = TransformerConfig if arch.latent is None else MLATransformerConfig
    return config_class(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        layernorm_epsilon=arch.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=ACTIVATION_FUNCTIONS[arch.activation],
        layernorm_zero_centered_gamma=arch.zero_centered_norm,
        softmax_scale=arch.softmax_scale(),
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=dims.vpp if dims.vpp > 1 else None,
        context_parallel_size=dims.cp,
        sequence_parallel=dims.sequence_parallel,
        pipeline_model_parallel_layout=megatron_layout(arch.num_layers, dims.pp, dims.vpp),
        # Every weight is read from a checkpoint right after construction.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # Packs differ in length from micro-batch to micro-batch; Megatron couples that to this dispatcher.
        variable_seq_lengths=dims.pp > 1 and dims.vpp == 1,
        moe_token_dispatcher_type="alltoall",
        # With batched exchange, prev and next of a two-stage ring are one rank and its messages cross.
        overlap_p2p_comm=dims.vpp > 1,
        batch_p2p_comm=dims.vpp == 1,
        # The fused kernel knows one set of frequencies for all sequences, one position a token, and no interleaved pairs.
        apply_rope_fusion=with_engine and arch.latent is None and not isinstance(arch.rope, LongRope) and not arch.rotary_axes,
        # Gate and product in one kernel, which keeps the first product alone for the backward pass.
        bias_activation_fusion=with_engine and arch.gates_in_one_kernel,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **_window(arch),
        **({} if arch.latent is None else latent_config(arch.latent, arch)),
        **expert_fields(arch, dims, grouped=with_engine),
        **_recompute(options),
    )


def _recompute(options: BuildOptions) -> dict[str, Any]:
    if options.recompute == "full":
        method = "uniform" if options.recompute_layers is None else "block"
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": 1}
    if options.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
    return {}


def _recompute_first(chunks: Sequence[Any], num_layers: int) -> None:
    """Recompute the first ``num_layers`` of this stage. Megatron counts them in every chunk anew; under the interleaved schedule
    the first chunks wait longest for their backward pass."""
    for chunk in chunks:
        taken = min(num_layers, len(chunk.decoder.layers))
        num_layers -= taken
        chunk.decoder.config = copy(chunk.decoder.config)
        chunk.decoder.config.recompute_num_layers = taken


def _window(arch: Architecture) -> dict[str, Any]:
    if arch.window is None:
        return {}
    in_layers = [int(windowed) for windowed in arch.windowed_layers] or None
    return {"window_size": (arch.window - 1, 0), "window_attn_skip_freq": in_layers}


def _layer_spec(arch: Architecture, config: TransformerConfig, options: BuildOptions, spec_name: str, sparse: bool) -> ModuleSpec:
    num_experts = config.num_moe_experts if sparse else None
    if spec_name == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts,
            moe_grouped_gemm=sparse,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=arch.latent is not None,
        )
    else:
        layer = get_gpt_layer_local_spec(
            normalization="RMSNorm",
            num_experts=num_experts,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=arch.latent is not None,
        )
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = CoreAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    adapt_layer(layer, arch, config)
    if arch.latent is not None:
        attend_latently(layer)
    if sparse:
        assert arch.experts is not None
        route(layer, arch.experts, options.moe_aux_loss_coefficient, options.moe_z_loss_coefficient)
    return layer


def _block_spec(
    arch: Architecture, config: TransformerConfig, options: BuildOptions, spec_name: str, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of one chunk, dense or sparse as the architecture says."""
    kinds = {
        sparse: _layer_spec(arch, config, options, spec_name, sparse)
        for sparse in set(map(arch.has_experts, range(arch.num_layers)))
    }
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    norm = LayerNormImpl if spec_name == "transformer_engine" else RMSNorm
    return TransformerBlockSubmodules(layer_specs=[kinds[arch.has_experts(layer)] for layer in numbers], layer_norm=norm)


def build_model(arch: Architecture, context: ParallelContext, options: BuildOptions, head: HeadKind = "token") -> list[nn.Module]:
    """This rank's chunks (one, or one a virtual stage), weights unset but for the value head."""
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # its deprecation notice
    config = megatron_config(arch, context, options)
    spec_name = resolve_layer_spec(options, context.device)
    frequencies = inverse_frequencies(arch).to(context.device)
    chunks: list[nn.Module] = []
    for stage in range(context.dims.vpp):
        vp_stage = stage if context.dims.vpp > 1 else None
        has_embedding, has_output = stage_of_chunk(context.dims, context.pp_rank, stage)
        model = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(arch, config, options, spec_name, vp_stage),
            vocab_size=padded_vocab_size(arch.vocab_size, context.dims.tp),
            max_sequence_length=arch.max_positions,
            pre_process=has_embedding,
            post_process=has_output,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=arch.tied_embeddings and head == "token",
            parallel_output=True,
            pg_collection=context.groups,
            vp_stage=vp_stage,
        )
        if arch.vision is not None:
            own = spec_name == "torch"
            model.rotary_pos_emb = GridRotary(frequencies, arch.rotary_axes, arch.vision.merge, rotates_pack=own)
        elif isinstance(arch.rope, LongRope):
            model.rotary_pos_emb = LongRotary(arch.rope, frequencies)
        elif arch.latent is None and config.apply_rope_fusion:  # latent attention has its own in each layer
            model.rotary_pos_emb.inv_freq = frequencies
        elif arch.latent is None:
            model.rotary_pos_emb = PackRotary(frequencies)
        if has_embedding and arch.embedding_scale != 1.0:
            scale_embeddings(model.embedding, arch.embedding_scale, config.params_dtype)
        if has_embedding and arch.vision is not None:
            add_tower(model, arch, context, config.params_dtype, options.vision, options.images)
        if head != "token" and has_output:
            model.output_layer = ValueHead(config, context.groups, options.seed, has_bias=head == "value")
        chunks.append(model.to(context.device))
    if config.recompute_method == "block":
        _recompute_first(chunks, options.recompute_layers or 0)
    return chunks


def freeze(chunks: Sequence[nn.Module]) -> None:
    """No gradients: for the reference."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
