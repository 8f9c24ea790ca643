"""Fixtures: one engine process for the session, put back into its first state after each test."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.unit.rollout_engine.process import Server, make_qwen2, save, start_server


@pytest.fixture(scope="session")
def qwen2() -> PreTrainedModel:
    return make_qwen2(random.randrange(2**31))


@pytest.fixture(scope="session")
def qwen2_folder(qwen2: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(qwen2, tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def shared_server(qwen2_folder: Path) -> Iterator[Server]:
    server = start_server(qwen2_folder)
    yield server
    server.process.terminate()
    assert server.process.wait(10) == 0


@pytest.fixture
def server(shared_server: Server, qwen2_folder: Path) -> Iterator[Server]:
    """The shared engine; afterwards it has its first weights again and generates at full speed."""
    yield shared_server
    shared_server.post("/slow_down", {"forward_sleep_time": None})
    shared_server.post("/abort_request", {"abort_all": True})
    shared_server.post("/continue_generation", {})
    shared_server.post("/update_weights_from_disk", {"model_path": str(qwen2_folder), "weight_version": "default"})
