"""A run that could start: a model folder, a data file, and a YAML file that names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlx.config.load import ConfigError, load_config

SHAPE = {
    "model_type": "qwen2",
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "hidden_size": 96,
    "head_dim": 12,
    "intermediate_size": 240,
    "vocab_size": 131,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    """Path of a minimal valid configuration."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: {model}}}\ndata: {{train: {tmp_path}/train.jsonl}}\nreward: {{name: exact}}\n")
    return path


@pytest.fixture
def problems(run_yaml: Path) -> Callable[..., tuple[str, ...]]:
    """Overrides of the valid configuration -> the problems reported."""

    def find(*overrides: str) -> tuple[str, ...]:
        try:
            load_config(run_yaml, overrides)
        except ConfigError as error:
            return error.problems
        return ()

    return find
