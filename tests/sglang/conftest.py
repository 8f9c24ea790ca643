"""Engines are dear to start: one of a kind serves a whole file. Stock SGLang comes in with ``-m sglang``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sglang.engines import RunningEngine, sglang_python
from tests.sglang.models import save

needs_sglang = pytest.mark.skipif(sglang_python() is None, reason="RLX_SGLANG_PYTHON names no interpreter with SGLang")
KINDS = ["embedded", pytest.param("sglang", marks=[pytest.mark.sglang, needs_sglang])]


@pytest.fixture(scope="session")
def first_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", 1, tmp_path_factory.mktemp("weights") / "llama")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningEngine]]:
    running: list[RunningEngine] = []

    def make(kind: str, model: Path, **options: object) -> RunningEngine:
        running.append(RunningEngine(kind, model, tmp_path_factory.mktemp(kind), checksums=kind == "sglang", **options))
        return running[-1]

    yield make
    for engine in running:
        engine.stop()


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, start: Callable[..., RunningEngine], first_weights: Path) -> RunningEngine:
    return start(request.param, first_weights).wait()


@pytest.fixture
def engine(shared: RunningEngine, first_weights: Path) -> Iterator[RunningEngine]:
    """The shared engine; afterwards it generates and has its first weights again."""
    yield shared
    control = shared.control()
    control.pause()
    control.resume()
    control.update_weights_from_disk(str(first_weights), "default")
    control.close()
