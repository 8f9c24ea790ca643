"""What a Hugging Face folder's ``config.json`` says about a model's shape, read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The numbers that a layout must divide. ``num_experts`` and ``expert_size`` are 0 for a dense model."""

    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    max_positions: int | None
    num_experts: int
    expert_size: int


def is_megatron_checkpoint(folder: str | Path) -> bool:
    """Whether a model folder holds a Megatron distributed checkpoint rather than Hugging Face weights."""
    return (Path(folder) / "metadata.json").is_file()


def read_model_facts(key: str, folder: str) -> ModelFacts | str:
    """The facts of ``folder``, or what is wrong with it, naming ``key`` and the file. ``folder`` is not empty."""
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        return f"{key}: no such folder {folder}; expected a Hugging Face folder with config.json"
    if not path.is_file():
        return f"{key}: {path} is missing; expected a Hugging Face folder"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{key}: {path} is not readable JSON: {error}"
    if not isinstance(tree, dict):
        return f"{key}: {path} must hold a JSON object"
    return _facts(key, path, tree)


def _facts(key: str, path: Path, tree: dict[str, Any]) -> ModelFacts | str:
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    missing = [name for name in needed if not _count(tree, name)]
    if missing:
        return f"{key}: {path} has no positive integer {', '.join(missing)}"
    num_experts = max(_count(tree, name) for name in _EXPERT_KEYS)
    return ModelFacts(
        model_type=str(tree.get("model_type", "")),
        num_layers=tree["num_hidden_layers"],
        num_heads=tree["num_attention_heads"],
        num_kv_heads=_count(tree, "num_key_value_heads") or tree["num_attention_heads"],
        hidden_size=tree["hidden_size"],
        max_positions=_count(tree, "max_position_embeddings") or None,
        num_experts=num_experts,
        expert_size=(_count(tree, "moe_intermediate_size") or _count(tree, "intermediate_size")) if num_experts else 0,
    )


def _count(tree: dict[str, Any], name: str) -> int:
    """The positive integer under ``name``, or 0 when there is none."""
    value = tree.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
