"""One sender, two real engines, real gloo: delivered weights are right, and every planted fault is caught and named."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from rlx.config.schema import SyncConfig
from rlx.rollout.sglang.control import EngineControl, EngineControlError
from rlx.rollout.sglang.segments import own_segments
from rlx.sync.errors import CanaryError, SyncError
from rlx.sync.publisher import Publisher
from rlx.sync.transports.handover import Handover
from tests.dist.sync_lab import (
    make_publisher,
    named,
    new_model,
    shapes,
    shared_engines,
    small_config,
    worst_difference,
)

UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture
def urls():
    return shared_engines().urls


@pytest.fixture(params=["stream", "broadcast", "ipc"])
def transport(request):
    return request.param


@pytest.fixture
def publisher_of(transport):
    opened: list[Publisher] = []

    def make(*args, **kwargs):
        opened.append(make_publisher(*args, transport=transport, **kwargs))
        return opened[-1]

    yield make
    for publisher in opened:
        publisher.close()


def versions(urls):
    return [EngineControl(url, timeout_s=10).weight_version() for url in urls]


def is_paused(url):
    return httpx.get(f"{url}/server_info").json()["paused"]


def test_engines_score_the_new_weights(urls, publisher_of):
    old, new = new_model(0), new_model(time.time_ns() % 2**31)
    assert min(worst_difference(url, new) for url in urls) > 0.1
    publisher = publisher_of(urls, new)
    manifest = publisher.publish(7, iter(named(new)))
    assert versions(urls) == ["7", "7"] and not any(map(is_paused, urls))
    assert max(worst_difference(url, new) for url in urls) < 1e-4
    assert {info.name: info.shape for info in manifest.tensors} == shapes(new)
    assert manifest.version == 7 and manifest.num_bytes == sum(t.numel() * 4 for _, t in named(new)) and manifest.seconds > 0
    # Another publication over the same groups, cut differently: in bf16 on the wire, loaded as fp32.
    for parameter in old.parameters():
        parameter.data = parameter.data.bfloat16().float()
    # The first one's groups are still open, as after a trainer that died; they do not stand in the way.
    second = publisher_of(urls, old, config=SyncConfig(canary_first=1, timeout_s=20))
    second.publish(8, ((name, tensor.bfloat16()) for name, tensor in named(old)))
    assert max(worst_difference(url, old) for url in urls) < 1e-4 and versions(urls) == ["8", "8"]


def corrupt(tensors):
    return [(name, tensor + 0.3 * torch.randn_like(tensor) if name == NORM else tensor) for name, tensor in tensors]


def swap(tensors):
    table = dict(tensors)
    return [(name, table[{UP: DOWN, DOWN: UP}.get(name, name)]) for name, _ in tensors]


@pytest.mark.parametrize(("plant", "names"), [(corrupt, {NORM}), (swap, {UP, DOWN})])
def test_the_canary_finds_wrong_values_and_the_search_names_them(urls, publisher_of, plant, names):
    model = new_model(3)
    with pytest.raises(CanaryError, match=r"weight sync 4, phase canary: engine http.* mean difference") as caught:
        publisher_of(urls, model).publish(4, iter(plant(named(model))))
    assert set(re.findall(r"([\w.]+weight) \(by up to", str(caught.value))) == names
    assert all(url in str(caught.value) for url in urls)
    assert all(map(is_paused, urls))


def shifted(publisher: Publisher, shift: Callable[[int], float]) -> Publisher:
    """Its trainer scores place n of a sequence ``shift(n)`` nats higher than the engine will."""
    spec = publisher._canary
    assert spec is not None

    def score(sequences, images):
        return [[score + shift(n) for n, score in enumerate(row)] for row in spec.score_on_trainer(sequences, images)]

    publisher._canary = replace(spec, score_on_trainer=score)
    return publisher


def refuse(self: EngineControl, name: str, num_rows: int) -> object:
    raise EngineControlError(self.url, "GET /get_weights_by_name", "HTTP 400: Get parameter by name failed", refused=True)


def everywhere(nats: float) -> Callable[[int], float]:
    return lambda place: nats


def at_the_start(nats: float) -> Callable[[int], float]:
    return lambda place: nats if place == 0 else 0.0


@pytest.mark.parametrize(
    ("gives_tensors", "shift", "says"),
    [
        (True, everywhere(4e-3), "none found, 30 are equal to the trainer's; with empty caches mean difference 0.004"),
        (False, at_the_start(2e-2), "Get parameter by name failed; .*the median is within the tolerance"),
    ],
)
def test_rounding_alone_leaves_a_doubt_and_the_engines_serving(urls, publisher_of, monkeypatch, gives_tensors, shift, says):
    if not gives_tensors:
        monkeypatch.setattr(EngineControl, "weights_by_name", refuse)
    model = new_model(5)
    publisher = shifted(publisher_of(urls, model), shift)
    for version in (6, 7):
        report = publisher.publish(version, iter(named(model))).canary
        assert report is not None and 1e-3 < report.difference < 1e-2 and len(report.doubts) == 2
        assert all(url in doubt and re.search(says, doubt) for url, doubt in zip(urls, report.doubts, strict=True))
    assert versions(urls) == ["7", "7"] and not any(map(is_paused, urls))
    assert max(worst_difference(url, model) for url in urls) < 1e-4


@pytest.mark.parametrize(
    ("gives_tensors", "shift", "says"),
    [
        (True, everywhere(2e-2), "30 are equal .*weights are equal but the engine computes otherwise: a stale cache, or another"),
        (True, lambda place: math.nan, "computes otherwise"),
        (False, everywhere(2e-3), "Get parameter by name failed; .*that is more than rounding"),
        (False, at_the_start(2e-1), "that is more than rounding"),
    ],
)
def test_what_rounding_does_not_explain_raises(urls, publisher_of, monkeypatch, gives_tensors, shift, says):
    if not gives_tensors:
        monkeypatch.setattr(EngineControl, "weights_by_name", refuse)
    model = new_model(5)
    with pytest.raises(CanaryError, match=rf"weight sync 6, phase canary: engine http.*{says}"):
        shifted(publisher_of(urls, model), shift).publish(6, iter(named(model)))
    assert all(map(is_paused, urls))


def without(*dropped):
    return lambda tensors: [item for item in tensors if item[0] not in dropped]


def replaced(name, change):
    return lambda tensors: [(n, change(t)) if n == name else (n, t) for n, t in tensors]


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (without(UP, NORM), rf"2 tensors .* missing: {UP}, {NORM}"),
        (lambda tensors: [*tensors, ("model.layers.9.mlp.up_proj.weight", torch.randn(3))], r"model\.layers\.9.* is unknown"),
        (lambda tensors: [*tensors[:5], tensors[1], *tensors[5:]], r"model\.layers\.0\.self_attn\.q_proj\.weight is sent twice"),
        (replaced(UP, lambda t: t[:-1]), rf"{UP} has shape \[43, 24\], the engines' model needs \[44, 24\]"),
        (replaced(NORM, lambda t: t.double()), rf"{NORM} has dtype torch\.float64"),
    ],
)
def test_what_does_not_fit_raises_before_continue(urls, publisher_of, plant, message):
    model = new_model(3)
    tensors = iter(plant(named(model)))
    publisher = publisher_of(urls, model)
    with pytest.raises(SyncError, match=message):
        publisher.publish(4, tensors)
    assert next(tensors, None) is None, "the iterator must be driven to its end: its gathers are collective"
    assert all(map(is_paused, urls))
    with pytest.raises(SyncError, match="an earlier one failed"):
        publisher.publish(5, iter(named(model)))


@pytest.mark.parametrize("transport", ["stream", "broadcast"])
def test_a_skipped_bucket_is_named(urls, publisher_of, transport, monkeypatch):
    model = new_model(3)
    call = "update_weights" if transport == "broadcast" else "update_weights_from_tensor"
    real = getattr(EngineControl, call)
    skipped = []

    def skip_third(self, *args, **kwargs):
        skipped.append(self.url)
        if len(skipped) == 3:
            return  # the engine never hears of this chunk, the other one's second
        real(self, *args, **kwargs)

    monkeypatch.setattr(EngineControl, call, skip_third)
    began = time.monotonic()
    with pytest.raises(SyncError, match=rf"phase {transport}, chunk 1 \(\d+ tensors, (.*) to .*\)") as caught:
        publisher_of(urls, model, config=small_config(timeout_s=3)).publish(4, iter(named(model)))
    assert time.monotonic() - began < 15 and skipped
    assert re.search(r"model\.\S+ to model\.\S+", str(caught.value))


@pytest.mark.parametrize("transport", ["ipc"])
def test_an_engine_that_never_hears_of_it_is_named(urls, publisher_of, monkeypatch):
    model = new_model(3)
    real = EngineControl.update_weights_from_tensor
    monkeypatch.setattr(
        EngineControl,
        "update_weights_from_tensor",
        lambda self, *args, **kwargs: None if self.url == urls[1] else real(self, *args, **kwargs),
    )
    began = time.monotonic()
    with pytest.raises(
        SyncError, match=rf"phase load: trainer rank 0: engine side, phase load: {urls[1]}: nothing for 1.5 s"
    ) as caught:
        publisher_of(urls, model, config=small_config(timeout_s=3)).publish(4, iter(named(model)))
    assert time.monotonic() - began < 15 and caught.value.engines == (urls[1],)
    assert not list(Path("/dev/shm").glob(f"{own_segments().prefix.name}-*.book")), "nothing stays once it has failed"


def test_an_iterator_that_fails_is_reported_with_its_place(urls, publisher_of):
    model = new_model(3)

    def broken():
        yield from named(model)[:4]
        raise OSError("gather lost a rank")

    with pytest.raises(
        SyncError, match=rf"trainer side, stage 0, phase gather, after tensor {named(model)[3][0]}: OSError: gather"
    ):
        publisher_of(urls, model).publish(4, broken())


def test_control_errors_name_url_call_and_message(urls):
    control = EngineControl(urls[0], timeout_s=5)
    with pytest.raises(EngineControlError, match=rf"{urls[0]}: POST /destroy_weights_update_group: .*does not exist"):
        control.destroy_group("nobody")
    with pytest.raises(EngineControlError, match=r"POST /pause_generation: .*mode"):
        control.pause("sideways")
    with pytest.raises(EngineControlError, match=r"http://127\.0\.0\.1:9: GET /model_info: ConnectError"):
        EngineControl("http://127.0.0.1:9", timeout_s=5).model_info()
    quick = EngineControl(urls[0], timeout_s=0.3)
    control.pause()
    with pytest.raises(EngineControlError, match=r"POST /generate: no answer within 0\.3 s"):
        quick.score([1, 2, 3])
    control.resume()
    assert len(control.score([1, 2, 3])) == 2


@pytest.mark.parametrize("transport", ["ipc"])
def test_where_gpu_memory_cannot_be_shared_weights_go_through_host_memory(urls, publisher_of, monkeypatch, caplog):
    monkeypatch.setattr(Handover, "refusal", lambda self: "CUDA error: operation not supported")
    model = new_model(time.time_ns() % 2**31)
    publisher = publisher_of(urls, model)
    for version in (5, 6):
        publisher.publish(version, iter(named(model)))
    assert versions(urls) == ["6", "6"] and max(worst_difference(url, model) for url in urls) < 1e-4
    said = [record.getMessage() for record in caplog.records if "CUDA IPC is refused" in record.getMessage()]
    assert len(said) == 1 and "operation not supported" in said[0] and "sync.transport=shm" in said[0]
