"""Tiny random mixture-of-experts checkpoints, and what transformers computes on them: log-probs and gradients.

Runs in a process of its own: the CPU backend of ``rlx.parallel`` and transformers' models do not share one.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

COMMON: dict[str, Any] = {
    "vocab_size": 131,  # prime: pads under every tensor-parallel size
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}


def qwen3_moe() -> nn.Module:
    config = Qwen3MoeConfig(
        **COMMON, head_dim=16, intermediate_size=80, moe_intermediate_size=20, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=True, mlp_only_layers=[1],
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def mixtral() -> nn.Module:
    config = MixtralConfig(**COMMON, intermediate_size=28, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config)


def qwen2_moe() -> nn.Module:
    config = Qwen2MoeConfig(
        **COMMON, intermediate_size=80, moe_intermediate_size=20, shared_expert_intermediate_size=36, num_experts=6,
        num_experts_per_tok=3, decoder_sparse_step=2,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config)


class DeepSeekBlock(nn.Module):
    """The block of DeepSeek-MoE (Dai et al. 2024): softmax, top-k without renormalisation, shared experts added."""

    def __init__(self, config: LlamaConfig, num_experts: int, top_k: int, size: int, num_shared: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(config.hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(_sized(config, size)) for _ in range(num_experts))
        self.shared_experts = LlamaMLP(_sized(config, size * num_shared))

    def forward(self, hidden: Tensor) -> Tensor:
        weights, chosen = F.softmax(self.gate(hidden), dim=-1).topk(self.top_k, dim=-1)
        outputs = torch.stack([expert(hidden) for expert in self.experts], dim=-2)
        picked = outputs.gather(-2, chosen[..., None].expand(*chosen.shape, hidden.shape[-1]))
        return (picked * weights[..., None]).sum(dim=-2) + self.shared_experts(hidden)


def _sized(config: LlamaConfig, size: int) -> LlamaConfig:
    return LlamaConfig(**{**config.to_dict(), "intermediate_size": size})


def deepseek() -> nn.Module:
    config = LlamaConfig(**COMMON, intermediate_size=80)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers[1:]:
        layer.mlp = DeepSeekBlock(config, num_experts=6, top_k=2, size=20, num_shared=2)
        for linear in (module for module in layer.mlp.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=COMMON["initializer_range"])
    return model


DEEPSEEK_FIELDS = {
    "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "n_routed_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 20, "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "scoring_func": "softmax", "norm_topk_prob": False,
}  # fmt: skip

YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0,
    "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.9,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **COMMON, "num_key_value_heads": 4, "intermediate_size": 80, "moe_intermediate_size": 20, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
    "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_group": 4, "topk_group": 2,
}  # fmt: skip


def deepseek_v2() -> nn.Module:
    """Two amendments: transformers leaves out the factor that DeepSeek's own code, and every engine, puts on V2's scores under
    YaRN, and its grouped routing looks for an attribute that its block does not have."""
    config = DeepseekV2Config(**LATENT, q_lora_rank=28, topk_method="group_limited_greedy", rope_parameters=YARN)
    model = DeepseekV2ForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.num_experts = LATENT["n_routed_experts"]
        layer.self_attn.scaling *= (0.1 * YARN["mscale_all_dim"] * math.log(YARN["factor"]) + 1) ** 2
    return model


def deepseek_v2_lite() -> nn.Module:
    return DeepseekV2ForCausalLM(DeepseekV2Config(**LATENT, q_lora_rank=None, topk_method="greedy"))


def deepseek_v3() -> nn.Module:
    return DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT, q_lora_rank=28, rope_parameters=YARN))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "deepseek": deepseek,
    "deepseek_v2": deepseek_v2,
    "deepseek_v2_lite": deepseek_v2_lite,
    "deepseek_v3": deepseek_v3,
}


def disturb(model: nn.Module) -> None:
    """Away from the default ones and zeros, so that a forgotten norm or bias shows."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name or "bias" in name:
            tensor.data += 0.2 * torch.randn(tensor.shape)


def save(family: str, model: nn.Module, folder: Path) -> None:
    if family != "deepseek":
        model.save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | DEEPSEEK_FIELDS))


def on_disk(family: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of the file: transformers 5 computes with all experts in one tensor, and saves them one by one."""
    block, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    if family == "mixtral":
        block, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    split = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(model\.layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)", name)
        if found is None:
            split[name.replace(".mlp.gate.", f".{block}.gate.")] = tensor
            continue
        for number, matrix in enumerate(tensor):
            one = f"{found[1]}{block}.experts.{number}."
            if found[2] == "down_proj":
                split[f"{one}{down}.weight"] = matrix
            else:
                split[f"{one}{gate}.weight"], split[f"{one}{up}.weight"] = matrix.chunk(2)
    return split


def balanced_grads(model: nn.Module, sequences: list[list[int]], aux: float, z: float) -> dict[str, Tensor]:
    """Gradients of the next-token loss and the balancing losses, written out sequence by sequence in float64."""
    model.zero_grad()
    num_tokens = sum(len(tokens) - 1 for tokens in sequences)
    total = torch.zeros((), dtype=torch.float64)
    for tokens in sequences:
        ids = torch.tensor([tokens])
        output = model(ids, output_router_logits=True)
        logprobs = F.log_softmax(output.logits[0, :-1].double(), dim=-1).gather(1, ids[0, 1:, None])
        total = total - logprobs.sum()
        for logits in output.router_logits:
            logits = logits.double()
            num_experts, top_k = logits.shape[1], model.config.num_experts_per_tok
            probs = logits.softmax(dim=-1)
            shares = F.one_hot(probs.topk(top_k).indices, num_experts).sum(dim=1).double().mean(dim=0) / top_k
            loss = aux * num_experts * (shares * probs.mean(dim=0)).sum() + z * (logits.logsumexp(dim=-1) ** 2).mean()
            total = total + (len(tokens) - 1) * loss
    (total / num_tokens).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def main(arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    results = {}
    for number, family in enumerate(arguments["families"]):
        torch.manual_seed(number + arguments.get("seed", 0))
        model = FAMILIES[family]()
        disturb(model)
        save(family, model, Path(arguments["folder"]) / family)
        if not arguments["sequences"]:
            continue
        logprobs = []
        for tokens in arguments["sequences"]:
            ids = torch.tensor([tokens])
            scores = F.log_softmax(model(ids).logits[0, :-1].float(), dim=-1)
            logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0])
        loss = -torch.cat(logprobs).mean()
        loss.backward()
        assert math.isfinite(float(loss))
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        results[family] = {"logprobs": [row.detach() for row in logprobs], "grads": on_disk(family, grads)}
        if family == arguments["balanced"]["family"]:
            balanced = balanced_grads(model, arguments["sequences"], arguments["balanced"]["aux"], arguments["balanced"]["z"])
            results[family]["balanced"] = on_disk(family, balanced)
    torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
