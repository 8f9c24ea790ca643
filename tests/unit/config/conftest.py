"""A run that could start: a model folder, a data file, and a YAML file that names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlx.config.load import ConfigError, load_config
from tests.tiny import write_model


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    """Path of a minimal valid configuration."""
    model = write_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "label": "2", "response": "2", "chosen": "2", "rejected": "3"}\n')
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
