"""SGLang's checksums of its parameters, computed from a Hugging Face folder: sha256 of the raw bytes, first 8 of them.

SGLang holds vocabularies padded with zeros to a multiple of 64 rows.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

VOCAB_MULTIPLE = 64
_FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)} | {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")


def folder_checksums(folder: Path, prefix: str = "") -> dict[str, str]:
    """By SGLang's parameter name, for an engine of one rank."""
    tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return {name: _digest(_padded(name, tensor)) for name, tensor in _fused(tensors).items()}


def _padded(name: str, tensor: Tensor) -> Tensor:
    if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % VOCAB_MULTIPLE))


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, dict[int, Tensor]] = {}
    experts: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, tensor in tensors.items():
        expert = _EXPERT.match(name)
        if expert:
            base, number, kind = expert.groups()
            fused = "w2_weight" if kind in ("down_proj", "w2") else "w13_weight"
            order = 1 if kind in ("up_proj", "w3") else 0
            experts.setdefault(f"{base}.{fused}", {})[int(number), order] = tensor
            continue
        *head, kind, leaf = name.split(".")
        fused_kind, order = _FUSED.get(kind, (kind, 0))
        parts.setdefault(".".join([*head, fused_kind, leaf]), {})[order] = tensor
    whole = {name: torch.cat([pieces[order] for order in sorted(pieces)]) for name, pieces in parts.items()}
    for name, pieces in experts.items():
        rows = [torch.cat([pieces[key] for key in sorted(pieces) if key[0] == number]) for number in range(1 + max(pieces)[0])]
        whole[name] = torch.stack(rows)
    return whole


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
