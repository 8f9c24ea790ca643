"""Weights through shared memory, on both kinds of engines; memory given back and taken again by the book."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path

import pytest
import torch

from rlx.rollout.sglang.control import EngineControlError
from rlx.rollout.sglang.shared_tensors import LOAD_FORMAT, open_bucket, share_bucket
from rlx.sync.chunks import tensor_info
from rlx.sync.engine_memory import (
    KEY_VALUES,
    WEIGHTS,
    EngineMemory,
    Sharing,
)
from rlx.sync.errors import CanaryError, SyncError
from rlx.sync.group import Endpoint, Engine
from rlx.sync.publisher import Publisher
from tests.sglang.conftest import KINDS
from tests.sglang.engines import RunningEngine
from tests.sglang.models import make, scores
from tests.sglang.publishers import canary_of, make_publisher
from tests.sglang.test_protocol import TOLERANCE, weights, worst

pytestmark = pytest.mark.timeout(900)  # the first test waits for the engine


def shared_publisher(
    engine: RunningEngine, model, room: list[str], transport: str = "ipc", **settings
) -> tuple[Publisher, EngineMemory]:
    memory = EngineMemory((KEY_VALUES, WEIGHTS))
    sharing = Sharing(memory=memory, make_room=lambda: room.append("made"))
    canary = canary_of(lambda rows, images: [scores(model, row) for row in rows])
    return make_publisher(engine, model, canary, transport=transport, sharing=sharing, **settings), memory


@pytest.mark.parametrize("transport", ["ipc", "shm"])
def test_publications_in_turns(engine: RunningEngine, transport: str) -> None:
    """Release, train, publish, serve: five times, with other weights each time."""
    room: list[str] = []
    for turn, (seed, bucket_bytes) in enumerate([(51, 30_000), (52, 1), (53, 10**9)], start=1):
        model = make("llama", seed)
        publisher, _ = shared_publisher(engine, model, room, transport, bucket_bytes=bucket_bytes)
        try:
            for version in (2 * turn, 2 * turn + 1):
                publisher.release()
                manifest = publisher.publish(version, weights(model))
                assert engine.control().weight_version() == str(version) and worst(engine, model) < TOLERANCE
            assert manifest.num_bytes == sum(tensor.numel() * 4 for tensor in model.state_dict().values())
            publisher.release((KEY_VALUES,))  # a pause that keeps the weights
            publisher.serve()
            assert worst(engine, model) < TOLERANCE
        finally:
            publisher.close()
    assert len(room) == 6


def test_wrong_weights_are_caught(engine: RunningEngine) -> None:
    model, wrong = make("llama", 61), make("llama", 62)
    publisher, _ = shared_publisher(engine, model, [])
    try:
        with pytest.raises(CanaryError, match=engine.url):
            publisher.publish(9, weights(wrong))
    finally:
        publisher.close()
    engine.control().resume()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ["ipc", "shm"])
def test_a_tensor_that_does_not_fit_is_named(start, kind: str, first_weights: Path, transport: str) -> None:
    """The receiver says so, and so does the embedded engine; SGLang by itself ends, and is to be replaced."""
    engine = start(kind, first_weights).wait()
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = make("llama", 63).state_dict() | {name: torch.zeros(24, 40)}
    strange = type("Strange", (), {"state_dict": lambda self: tensors})()
    publisher, _ = shared_publisher(engine, strange, [], transport, canary_first=0, canary_every=0)
    try:
        where = "engine side, phase load" if transport == "ipc" else r"engine side, stage 0, phase load, chunk \d+ "
        with pytest.raises(SyncError, match=rf"{where}.*{engine.url}") as caught:
            publisher.publish(10, iter(tensors.items()))
        assert caught.value.engines == ((engine.url,) if (kind, transport) == ("sglang", "shm") else ())
    finally:
        publisher.close()


def test_the_book_keeps_an_engine_from_harm(engine: RunningEngine) -> None:
    """Nothing is released or resumed twice: SGLang would end itself."""
    memory = EngineMemory((KEY_VALUES, WEIGHTS))
    control = engine.control()
    known = Engine(endpoint=Endpoint(url=engine.url), control=control)
    memory.resume(known, (WEIGHTS, KEY_VALUES))
    memory.release(known, (KEY_VALUES,))
    memory.release(known)
    memory.release(known)
    memory.resume(known, (WEIGHTS,))
    memory.resume(known, (WEIGHTS, KEY_VALUES))
    control.resume()
    assert worst(engine, make("llama", 1)) < TOLERANCE
    control.close()


def test_the_embedded_engine_opens_buckets_only(start, first_weights: Path) -> None:
    engine = start("embedded", first_weights).wait()
    control = engine.control()
    tensor = torch.zeros(4, 4)
    good = share_bucket(tensor.flatten().view(torch.uint8), [tensor_info("lm_head.weight", tensor)])
    evil = base64.b64encode(pickle.dumps(print)).decode()
    control.begin_update()
    for texts, load_format, says in [
        ([evil], LOAD_FORMAT, "builtins.print has no place in a bucket"),
        (["no base64!"], LOAD_FORMAT, "cannot be opened"),
        ([good], None, "load_format is None"),
        ([good, good], LOAD_FORMAT, "2 entries"),
        ([good], LOAD_FORMAT, r"'lm_head.weight' has shape \[4, 4\]"),
    ]:
        with pytest.raises(EngineControlError, match=says) as caught:
            control.update_weights_from_tensor(texts, load_format=load_format, flush_cache=False, weight_version="x")
        assert caught.value.refused
    control.end_update()
    with pytest.raises(EngineControlError, match="weights was not released"):
        control.resume_memory([WEIGHTS])
    assert control.weight_version() == "default" and worst(engine, make("llama", 1)) < TOLERANCE
    with pytest.raises(ValueError, match="cannot be opened"):
        open_bucket(evil)
    control.close()
