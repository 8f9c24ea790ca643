"""A trainer of one rank on GPU 0, for the measurements."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rlx.arch.families.registry import read_architecture
from rlx.config.schema import AlgorithmConfig, Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig
from rlx.models.build import BuildOptions, build_model, freeze
from rlx.parallel.context import ParallelContext, build_context, connect
from rlx.processes.device import take_device
from rlx.types.layout import ParallelDims
from rlx.types.precision import BF16

LIMIT_S = 120.0


def one_rank(device_name: str = "cuda") -> ParallelContext:
    device = take_device(device_name, 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connect(init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, device=device, timeout_s=LIMIT_S)
    return build_context(ParallelDims(world_size=1), device, seed=0, timeout_s=LIMIT_S)


def config_of(model_dir: Path, layer_spec: str = "auto", max_concurrent: int = 512) -> Config:
    return Config(
        model=ModelConfig(path=str(model_dir), dtype="bf16", layer_spec=layer_spec),
        data=DataConfig(train="none"),
        reward=RewardConfig(name="numeric"),
        algorithm=AlgorithmConfig(name="grpo"),
        rollout=RolloutConfig(dtype="bf16", max_concurrent_requests=max_concurrent),
    )


def random_model(model_dir: Path, context: ParallelContext) -> list[nn.Module]:
    """A Megatron model with random weights that nothing was read for."""
    chunks = build_model(read_architecture(model_dir), context, BuildOptions(precision=BF16))
    freeze(chunks)
    randomise(chunks, 0)
    return chunks


def randomise(chunks: Sequence[nn.Module], seed: int) -> None:
    generator = torch.Generator(device=next(chunks[0].parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                is_norm = "norm" in name or "ln_q" in name
                parameter.normal_(1.0 if is_norm else 0.0, 0.02, generator=generator)
