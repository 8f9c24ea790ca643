"""Tiny random checkpoints of the families that SGLang serves on CPUs, and transformers' word on what they say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlx.models.hf.auto_classes import needs_score_bias
from rlx.models.hf.whole import SCORE_BIAS

VOCAB = 131

# On CPUs SGLang pads hidden units to a multiple of 32 a rank (here there are up to two) and then cannot read fused or experts'
# weights that are not; nor are its checksums those of what was sent.
_DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MOE = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, object]] = {
    "qwen2": {},
    "llama": {"rope_parameters": _LLAMA3_ROPE},
    "qwen3": {"head_dim": 16},
    "phi3": {"sliding_window": None},
    "qwen3_moe": {**_MOE, "head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": []},
    "mixtral": {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}


def make(family: str, seed: int) -> PreTrainedModel:
    """Random weights in which biases and norms matter too."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_DENSE | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def make_reward_model(family: str, seed: int) -> PreTrainedModel:
    """As `rlx rm` exports one: one label, its logit the score."""
    body = make(family, seed)
    config = body.config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model.base_model.load_state_dict(body.base_model.state_dict())
    return model


def save_reward_model(model: PreTrainedModel, folder: Path) -> None:
    """With the tensor that stands in an export for SGLang alone."""
    state = model.state_dict()
    if needs_score_bias(model.config.model_type):
        state[SCORE_BIAS] = torch.zeros(1)
    model.save_pretrained(folder, state_dict=state)


def save(family: str, seed: int, folder: Path) -> Path:
    make(family, seed).save_pretrained(folder)
    return folder


def sequences(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


@torch.no_grad()
def scores(model: PreTrainedModel, tokens: Sequence[int]) -> list[float]:
    """Log-probs of tokens 1..L-1."""
    logits = model(torch.tensor([list(tokens)])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(list(tokens[1:]))[:, None])[:, 0].tolist()


@torch.no_grad()
def greedy(model: PreTrainedModel, tokens: Sequence[int], count: int) -> tuple[list[int], float]:
    """The likeliest continuation and the smallest lead of a choice over the next best, in nats."""
    ids, lead = list(tokens), float("inf")
    for _ in range(count):
        best = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(tokens) :], lead
