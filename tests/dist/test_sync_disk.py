"""Weights through a folder: two stages write, two real engines load; what is wrong is found before they are told."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from rlx.models.hf.folder import HfFolder
from rlx.rollout.sglang.control import EngineControl
from rlx.sync.collective_phase import PublisherPlace
from rlx.sync.errors import CanaryError, SyncError
from rlx.sync.transports.disk import DiskLane
from tests.dist.sync_lab import half, make_publisher, named, new_model, shapes, shared_engines, small_config, worst_difference

NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture
def urls() -> list[str]:
    return shared_engines().urls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((shared_engines().folder / "model" / "config.json").read_text())
    return tmp_path


class TwoRanks:
    """``share`` of two trainer ranks that are threads."""

    def __init__(self) -> None:
        self._texts: list[str | None] = [None, None]
        self._barrier = threading.Barrier(2, timeout=60)

    def share_of(self, rank: int):
        def share(text: str | None) -> list[str | None]:
            self._texts[rank] = text
            self._barrier.wait()
            texts = list(self._texts)
            self._barrier.wait()
            return texts

        return share


def test_two_stages_write_versions_and_the_last_one_stays(urls: list[str], folder: Path) -> None:
    ranks, versions = TwoRanks(), {4: new_model(70), 5: new_model(71)}

    config = replace(small_config(), canary_first=0, canary_every=2)  # of the second version

    def stage(rank: int):
        place = PublisherPlace(stage=rank, num_stages=2, is_sender=True, is_lead=rank == 0, rank=rank)
        publisher = make_publisher(urls, versions[5], place=place, share=ranks.share_of(rank), folder=folder, config=config)
        manifests = [publisher.publish(version, iter(half(named(model), rank))) for version, model in versions.items()]
        publisher.close()
        return manifests

    with ThreadPoolExecutor(2) as pool:
        both = [future.result(120) for future in [pool.submit(stage, rank) for rank in range(2)]]
    model = versions[5]
    assert [EngineControl(url, timeout_s=5).weight_version() for url in urls] == ["5", "5"]
    assert max(worst_difference(url, model) for url in urls) < 1e-4
    assert both[0][0].canary is None and both[0][1].canary == both[1][1].canary and both[0][1].canary.difference < 1e-5
    assert [{info.name for info in manifest.tensors} for manifests in both for manifest in manifests] == [set(shapes(model))] * 4
    assert {path.name for path in (folder / "sync").iterdir()} == {"version-5"}
    written = HfFolder(folder / "sync" / "version-5")
    assert set(written.files) == set(shapes(model)) and len(set(written.files.values())) > 2
    for name, tensor in named(model):
        assert torch.equal(written.read(name, 0, 0, tensor.shape[0]), tensor)
    assert json.loads((folder / "sync" / "version-5" / "config.json").read_text())["model_type"] == "llama"


def test_faults_are_named_and_the_engines_never_told(urls: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(72)
    config = small_config(timeout_s=2)

    def fails(match: str, tensors, kind: type[SyncError] = SyncError) -> None:
        publisher = make_publisher(urls, model, config=config, folder=folder)
        with pytest.raises(kind, match=match):
            publisher.publish(6, iter(tensors))
        publisher.close()
        assert all(httpx.get(f"{url}/server_info").json()["paused"] for url in urls)

    fails("missing: model.embed_tokens.weight", named(model)[1:])
    real = DiskLane._write

    def torn(self: DiskLane, tensors, name: str) -> None:
        real(self, tensors, name)
        if NORM in tensors:
            path = self._incoming / name
            path.write_bytes(path.read_bytes()[:-4])

    monkeypatch.setattr(DiskLane, "_write", torn)
    fails(r"trainer side, stage 0, phase write, chunk \d+ .*incoming is not the model that was sent.*header says", named(model))
    monkeypatch.setattr(DiskLane, "_write", lambda self, tensors, name: threading.Event().wait(4))
    fails(r"trainer side, stage 0, phase write, chunk 0 .*not done within", named(model))
    monkeypatch.setattr(DiskLane, "_write", real)
    assert [EngineControl(url, timeout_s=5).weight_version() for url in urls] == ["default", "default"]
    fails(rf"phase canary: .*{NORM} \(by up to", [(n, t + 0.5 if n == NORM else t) for n, t in named(model)], CanaryError)


def test_an_engine_that_does_not_see_the_folder_says_so(urls: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(73)
    real = EngineControl.update_weights_from_disk

    def elsewhere(self: EngineControl, path: str, version: str) -> None:
        real(self, path if self.url == urls[0] else "/nowhere" + path, version)

    monkeypatch.setattr(EngineControl, "update_weights_from_disk", elsewhere)
    publisher = make_publisher(urls, model, folder=folder)
    with pytest.raises(SyncError, match=rf"engine side, stage 0, phase load, chunk \d+ .*{urls[1]}.*/nowhere") as caught:
        publisher.publish(7, iter(named(model)))
    assert not caught.value.engines, "the engine is well"
    publisher.close()
