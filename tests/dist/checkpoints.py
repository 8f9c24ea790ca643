"""Tiny random Hugging Face checkpoints with awkward sizes, made by transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 131  # prime: pads under every tensor-parallel size


def _save(model: PreTrainedModel, folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Away from the default ones and zeros, so that a forgotten norm or bias shows.
        if "norm" in name or "bias" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def make_qwen2(folder: Path, seed: int = 0, tied: bool = True, num_layers: int = 4) -> Path:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.15,
    )
    return _save(Qwen2ForCausalLM(config), folder, seed)


def make_llama(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 50_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    return _save(LlamaForCausalLM(config), folder, seed)
