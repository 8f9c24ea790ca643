"""Streams: what both sides remember of the first publication serves all later ones, and nothing else does."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from rlx.rollout.sglang.control import EngineControl
from rlx.sync.errors import SyncError
from tests.dist.sync_lab import (
    make_publisher,
    named,
    new_model,
    reload_from_disk,
    shared_engines,
    small_config,
    worst_difference,
)


@pytest.fixture
def urls():
    shared = shared_engines()
    yield shared.urls
    for url in shared.urls:
        reload_from_disk(url, shared.folder)


def test_later_publications_take_one_request(urls, monkeypatch):
    asked: list[str] = []
    real = EngineControl.update_weights_from_tensor

    def counting(self, texts, **named):
        asked.append(self.url)
        real(self, texts, **named)

    monkeypatch.setattr(EngineControl, "update_weights_from_tensor", counting)
    models = [new_model(seed) for seed in (61, 62, 63)]
    publisher = make_publisher(urls, models[0], canary=False)
    try:
        for version, model in enumerate(models):
            asked.clear()
            manifest = publisher.publish(version, iter(named(model)))
            assert max(worst_difference(url, model) for url in urls) < 1e-4
            assert {EngineControl(url, timeout_s=10).weight_version() for url in urls} == {str(version)}
            assert [info.name for info in manifest.tensors] == [info.name for info in publisher_order(models[0])]
            assert len(asked) == len(urls) if version else len(asked) > 2 * len(urls)
    finally:
        publisher.close()


def publisher_order(model):
    """The tensors in their order: all of one type, so none moves within its chunk."""
    return [type("Info", (), {"name": name}) for name, _ in named(model)]


def test_tensors_larger_than_a_bucket_and_of_several_types(urls):
    """An odd number of two-byte elements in front would put wider ones at odd places: they come first."""
    models = [new_model(seed) for seed in (64, 65)]
    mixed = []
    for model in models:
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.bfloat16().float()
        mixed.append([(name, tensor.bfloat16() if "norm" in name else tensor) for name, tensor in named(model)])
    publisher = make_publisher(urls, models[0], canary=False, config=replace(small_config(), bucket_bytes=3000))
    try:
        for version in (0, 1, 2):
            publisher.publish(version, iter(mixed[version % 2]))
            assert max(worst_difference(url, models[version % 2]) for url in urls) < 1e-4
    finally:
        publisher.close()


def test_another_order_is_refused(urls):
    model = new_model(66)
    publisher = make_publisher(urls, model, canary=False, config=small_config(timeout_s=3))
    try:
        publisher.publish(1, iter(named(model)))
        tensors = named(model)
        tensors[4], tensors[5] = tensors[5], tensors[4]
        with pytest.raises(
            SyncError, match=r"trainer side, stage 0, phase stream, chunk \d+ .*other tensors than in the publication"
        ):
            publisher.publish(2, iter(tensors))
    finally:
        publisher.close()


def test_what_an_engine_says_is_heard(urls, monkeypatch):
    """An engine cannot fail a request from inside the receiver; it says so over the group."""
    model = new_model(67)
    wide = [
        (name, torch.cat([tensor, tensor[:1]]) if name.endswith("2.mlp.up_proj.weight") else tensor)
        for name, tensor in named(model)
    ]
    publisher = make_publisher(urls, model, canary=False)
    publisher._format = replace(publisher._format, shapes={name: tuple(tensor.shape) for name, tensor in wide})
    try:
        with pytest.raises(SyncError, match=r"engine side, stage 0, phase stream, chunk \d+") as caught:
            publisher.publish(1, iter(wide))
        for url in urls:
            assert re.search(rf"{url}, rank 0: ValueError: .*up_proj.weight' has shape \[45, 24\]", str(caught.value))
        assert caught.value.engines == ()
    finally:
        publisher.close()
