"""Weights through a folder, and a canary in doubt, on both kinds of engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlx.sync.engine_memory import (
    KEY_VALUES,
    WEIGHTS,
    EngineMemory,
    Sharing,
)
from rlx.sync.errors import CanaryError, SyncError
from rlx.sync.publisher import Publisher
from tests.sglang.engines import RunningEngine
from tests.sglang.models import make, scores
from tests.sglang.publishers import canary_of, make_publisher
from tests.sglang.test_protocol import TOLERANCE, weights, worst

pytestmark = pytest.mark.timeout(900)  # the first test waits for the engine


def disk_publisher(engine: RunningEngine, model, path: Path, *, shift: float = 0.0, room: list[str] | None = None) -> Publisher:
    """Its trainer scores ``shift`` nats higher than the weights do. With ``room`` the engine shares its device."""
    memory = EngineMemory((KEY_VALUES, WEIGHTS))
    sharing = None if room is None else Sharing(memory=memory, make_room=lambda: room.append("made"))
    canary = canary_of(
        lambda rows, images: [[score + shift for score in scores(model, row)] for row in rows], lambda: weights(model)
    )
    return make_publisher(engine, model, canary, transport="disk", sharing=sharing, folder=path / "sync")


def test_versions_through_a_folder(engine: RunningEngine, tmp_path: Path) -> None:
    room: list[str] = []
    for first, seed in ((3, 81), (5, 82)):
        model = make("llama", seed)
        publisher = disk_publisher(engine, model, tmp_path, room=room)
        try:
            for version in (first, first + 1):
                publisher.release()
                publisher.publish(version, weights(model))
                assert engine.control().weight_version() == str(version) and worst(engine, model) < TOLERANCE
                assert [folder.name for folder in (tmp_path / "sync").iterdir()] == [f"version-{version}"]
        finally:
            publisher.close()
    assert len(room) == 4


def test_wrong_weights_are_named(engine: RunningEngine, tmp_path: Path) -> None:
    model, name = make("llama", 83), "model.layers.1.mlp.down_proj.weight"
    wrong = [(n, t + 0.1 if n == name else t) for n, t in weights(model)]
    publisher = disk_publisher(engine, model, tmp_path)
    with pytest.raises(CanaryError, match=rf"{engine.url}.*{name} \(by up to 0.1"):
        publisher.publish(9, iter(wrong))
    with pytest.raises(SyncError, match="an earlier one failed"):
        publisher.publish(10, weights(model))
    publisher.close()
    engine.control().resume()


@pytest.mark.parametrize("colocated", [False, True])
def test_a_doubt_is_reported_and_a_wild_difference_raises(engine: RunningEngine, tmp_path: Path, colocated: bool) -> None:
    model, room = make("llama", 84), []
    publisher = disk_publisher(engine, model, tmp_path, shift=5e-3, room=room if colocated else None)
    manifest = publisher.publish(4, weights(model))
    publisher.close()
    assert manifest.canary is not None and 4e-3 < manifest.canary.difference < 6e-3
    assert len(manifest.canary.doubts) == 1 and "are equal to the trainer's" in manifest.canary.doubts[0]
    assert worst(engine, model) < TOLERANCE and len(room) == 2 * colocated
    publisher = disk_publisher(engine, model, tmp_path, shift=0.5, room=room if colocated else None)
    with pytest.raises(CanaryError, match=rf"{engine.url}.*The weights are equal but the engine computes otherwise"):
        publisher.publish(5, weights(model))
    publisher.close()
    engine.control().resume()
