"""Tiny random checkpoints of every dense family with awkward sizes, and what transformers computes from them in fp32.

Runs as a program of its own, free of rlx: its CPU backend replaces factories that transformers needs as they are.
Odd on purpose: a prime vocabulary, five layers, heads wider than hidden / heads, one key-value head, windows of six
tokens, and sequences on both sides of every border.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.dist.family_folders import LENGTHS, ORIGINAL_POSITIONS, VOCAB_SIZE, folder_of, sequences

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YI = {"rope_type": "default", "rope_theta": 5_000_000.0}
_MOSTLY_FULL = ["full_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.5, 1.7],
    "long_factor": [1.2, 1.9, 3.0, 4.1, 6.0, 7.5],
}


def qwen2(**changes: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_SHAPE | changes))


def qwen3(**changes: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE | {"head_dim": 16} | changes))


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SHAPE | changes))


def gemma2(**changes: Any) -> PreTrainedModel:
    own = {"head_dim": 20, "sliding_window": 6, "query_pre_attn_scalar": 30, "tie_word_embeddings": True}
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
    return Gemma2ForCausalLM(Gemma2Config(**_SHAPE | own | caps | changes))


def phi3(**changes: Any) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**_SHAPE | changes))


CASES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2 tied": lambda: qwen2(tie_word_embeddings=True),
    "qwen2 window": lambda: qwen2(use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3 tied": lambda: qwen3(tie_word_embeddings=True),
    "qwen3 one kv head": lambda: qwen3(num_key_value_heads=1, attention_bias=True),
    "llama 3.1": lambda: llama(rope_parameters=_LLAMA3),
    "llama biases": lambda: llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "deepseek-llm": lambda: llama(num_key_value_heads=4),
    "yi-1.5 200k": lambda: llama(rope_parameters=_YI, max_position_embeddings=200_000),
    "gemma2": gemma2,
    "gemma2 untied": lambda: gemma2(tie_word_embeddings=False, num_key_value_heads=1, layer_types=_MOSTLY_FULL),
    "phi3 4k": lambda: phi3(sliding_window=6),
    "phi3 128k": lambda: phi3(rope_parameters=_LONGROPE, original_max_position_embeddings=ORIGINAL_POSITIONS),
}


def _write(model: PreTrainedModel, root: Path, case: str, seed: int) -> None:
    """The same weights in both dtypes; norms and biases away from ones and zeros, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder_of(root, case, "fp32"))
    model.to(torch.bfloat16).save_pretrained(folder_of(root, case, "bf16"))


def _reference(folder: Path, kind: type[PreTrainedModel]) -> dict[str, Any]:
    """Log-probs of each sequence on its own, and the gradients of the mean over all their tokens."""
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    rows, total = [], sum(length - 1 for length in LENGTHS)
    for tokens in sequences():
        ids = torch.tensor([tokens])
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        if len(tokens) > 1:
            (-logprobs.sum() / total).backward()
        rows.append(logprobs.detach())
    return {"logprobs": rows, "grads": {name: parameter.grad for name, parameter in model.named_parameters()}}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for seed, (case, make) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = make()
        _write(model, root, case, seed)
        found[case] = _reference(folder_of(root, case, "fp32"), type(model))
    torch.save(found, root / "reference.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
