"""What never changes is sent once: engines that hold it get the rest, those that may not get all, and a wrong one is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlx.models.hf.companions import Companions
from rlx.sync.errors import CanaryError
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.transports.disk import SyncFolder
from rlx.trainer.link import EngineLink, LinkOptions
from rlx.types.precision import FP32
from rlx.types.weights import WeightManifest
from tests.dist.sync_lab import (
    VOCAB,
    named,
    new_model,
    reference_scores,
    reload_from_disk,
    shapes,
    shared_engines,
    small_config,
    worst_difference,
)

PART = "model.layers.1."


class Trained:
    """A model of which a layer never changes, and the way to two engines."""

    def __init__(self, transport: str, folder: Path | None = None, *, shares: bool = False, canary: bool = False) -> None:
        self.model, self.shared = new_model(80), shared_engines()
        self.constant = frozenset(name for name in shapes(self.model) if name.startswith(PART))
        spec = CanarySpec(
            vocab_size=VOCAB,
            seed=5,
            precision=FP32,
            score_on_trainer=lambda sequences, images: reference_scores(self.model, sequences),
            export=self._export,
        )
        sync = replace(small_config(), canary_first=10**6 if canary else 0, canary_every=10**6)
        beside = Companions.of(self.shared.folder / "model")
        where = None if folder is None else SyncFolder(path=folder / "sync", companions=beside)
        options = LinkOptions(sync=sync, transport=transport, folder=where, shares=shares, constant=self.constant)
        context: Any = SimpleNamespace(
            device=torch.device("cpu"),
            rank=0,
            pp_rank=0,
            is_sender=True,
            dims=SimpleNamespace(pp=1),
            gather_objects=lambda value: [value],
        )
        memory: Any = SimpleNamespace(put_away=lambda *levels: None, bring_back=lambda *levels: None)
        self.link = EngineLink(options, context, shapes(self.model), spec, memory)

    def _export(self) -> Iterator[tuple[str, Tensor]]:
        return iter(named(self.model))

    def step(self, seed: int) -> None:
        """All but the layer is other now."""
        other = new_model(seed).state_dict()
        self.model.load_state_dict({name: other.get(name) if name not in self.constant else t for name, t in named(self.model)})

    def publish(self, version: int, *lives: int) -> set[str]:
        """To engines in their ``lives``; the names of what was sent, after a look at all scores."""
        urls = self.shared.urls[: len(lives)]
        manifest = self.link.publish(
            version, tuple(Endpoint(url=url, incarnation=life) for url, life in zip(urls, lives, strict=True))
        )
        assert isinstance(manifest, WeightManifest), manifest
        assert max(worst_difference(url, self.model) for url in urls) < 1e-4
        assert manifest.num_bytes == sum(info.num_bytes for info in manifest.tensors)
        return {info.name for info in manifest.tensors}

    def forget(self, index: int) -> str:
        """An engine has the weights that it began with; its url."""
        url = self.shared.urls[index]
        reload_from_disk(url, self.shared.folder)
        return url

    @property
    def everything(self) -> set[str]:
        return set(shapes(self.model))


@pytest.fixture(params=["stream", "broadcast", "shm"])
def trained(request: pytest.FixtureRequest) -> Iterator[Trained]:
    found = Trained(request.param)
    yield found
    found.link.close()


def test_it_is_left_out_until_an_engine_is_another(trained: Trained) -> None:
    rest = trained.everything - trained.constant
    assert trained.constant and trained.publish(0, 0, 0) == trained.everything
    for version in (1, 2, 3):
        trained.step(80 + version)
        assert trained.publish(version, 0, 0) == rest
    trained.forget(1)  # as one that was started again
    trained.step(90)
    assert trained.publish(4, 0, 1) == trained.everything
    trained.step(91)
    assert trained.publish(5, 0, 1) == rest
    assert trained.publish(6, 0) == trained.everything, "another fleet"


def test_a_folder_is_always_a_whole_model(tmp_path: Path) -> None:
    trained = Trained("disk", tmp_path)
    for version in range(3):
        trained.step(60 + version)
        assert trained.publish(version, 0, 0) == trained.everything
    trained.link.close()


def test_engines_that_gave_their_weights_back_get_all() -> None:
    """What they take back is empty. Those that gave their cache only hold what they had."""
    trained = Trained("stream", shares=True)
    rest = trained.everything - trained.constant
    endpoints = tuple(Endpoint(url=url) for url in trained.shared.urls)
    assert [trained.publish(version, 0, 0) for version in range(2)] == [trained.everything, rest]
    assert trained.link.begin_training(endpoints, ("kv_cache",)) is None
    assert trained.publish(2, 0, 0) == rest
    assert trained.link.begin_training(endpoints, None) is None
    assert [trained.publish(version, 0, 0) for version in (3, 4)] == [trained.everything, rest]
    trained.link.close()


def test_an_engine_that_lost_it_unseen_fails_the_canary_and_it_is_named() -> None:
    trained = Trained("stream", canary=True)
    assert [trained.publish(version, 0, 0) for version in range(2)][1] == trained.everything - trained.constant
    lost = trained.forget(1)
    with pytest.raises(CanaryError, match=rf"weight sync 2, phase canary: engine {lost}") as caught:
        trained.publish(2, 0, 0)
    culprits = set(re.findall(r"([\w.]+weight) \(by up to", str(caught.value)))
    assert culprits and culprits <= trained.constant
    trained.link.close()
