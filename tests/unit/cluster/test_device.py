"""The device that was chosen decides what every process sees, before any of them imports torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig
from rlx.engines.engine_plan import EngineSite, check_placement, plan_engine
from rlx.parallel import cpu_backend
from rlx.processes.child_environment import child_environment
from rlx.processes.device import take_device
from rlx.rollout.keys import EngineKeys

SEEN = {"auto": "0,1", "cuda": "0,1", "cpu": ""}
IMPORTS = """
import os, pkgutil, sys, torch
import rlx.parallel
from rlx.parallel import cpu_backend
patched = {torch: cpu_backend._FACTORIES, torch.Tensor: ["to", "type", "cuda"],
           torch.distributed: ["all_gather", "reduce_scatter"],
           torch.cuda: ["current_device", "Stream", "Event", "stream", "synchronize", "set_device", "FloatTensor"]}
def state():
    return [getattr(owner, name) for owner, names in patched.items() for name in names], os.environ.get("CUDA_VISIBLE_DEVICES")
before = state()
for module in pkgutil.walk_packages(rlx.parallel.__path__, "rlx.parallel."):
    __import__(module.name)
assert state() == before
assert not [name for name in cpu_backend._GPU_PACKAGES if sys.modules.get(name, 0) is None]
try:
    cpu_backend.install()
except RuntimeError as error:
    print(error)
"""


def config_of(device: str, ranks: int = 1, **rollout: object) -> Config:
    return Config(
        model=ModelConfig(path="/no/such/model"),
        data=DataConfig(train="none"),
        reward=RewardConfig(name="numeric"),
        rollout=RolloutConfig(**rollout),  # type: ignore[arg-type]
        cluster=ClusterConfig(device=device, num_trainer_ranks=ranks),
    )


def settings_of(device: str, ranks: int = 1, **rollout: object) -> EngineSettings:
    return EngineSettings.of(config_of(device, ranks, **rollout))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """This process seems to see two GPUs; the devices that were claimed."""
    claimed: list[torch.device] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", claimed.append)
    return claimed


@pytest.mark.parametrize("device", SEEN)
@pytest.mark.usefixtures("two_gpus")
def test_children_of_every_launcher_see_what_was_chosen(device: str) -> None:
    assert (
        child_environment(ClusterConfig(device=device), "id", num_peers=1, all_here=True)["CUDA_VISIBLE_DEVICES"] == SEEN[device]
    )
    cluster = pytest.importorskip("rlx.cluster.ray.cluster", reason="ray is not installed")
    assert cluster.actor_environment(ClusterConfig(device=device), {}).get("CUDA_VISIBLE_DEVICES") == (
        "" if device == "cpu" else None
    )


@pytest.mark.parametrize("engine", ["embedded", "sglang"])
@pytest.mark.parametrize("device", SEEN)
@pytest.mark.usefixtures("two_gpus")
def test_an_engine_gets_the_gpus_of_the_plan_only_where_gpus_were_chosen(tmp_path: Path, device: str, engine: str) -> None:
    config = config_of(device, engine=engine)
    env = child_environment(config.cluster, "id", num_peers=1, all_here=True)
    site = EngineSite(index=0, run_dir=tmp_path, parent_pipe=0, env=env, keys=EngineKeys(), gpus=("1",))
    assert plan_engine(EngineSettings.of(config), site).env["CUDA_VISIBLE_DEVICES"] == ("" if device == "cpu" else "1")


def test_a_rank_takes_its_gpu_or_the_cpu(two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[bool] = []
    monkeypatch.setattr(cpu_backend, "install", lambda: installed.append(True))
    assert take_device("auto", 1) == torch.device("cuda", 1) and two_gpus == [torch.device("cuda", 1)] and not installed
    with pytest.raises(
        ValueError, match=r"cluster.num_trainer_ranks: 2 GPU\(s\) are visible here, none is left for local rank 2"
    ):
        take_device("cuda", 2)
    assert take_device("cpu", 0) == torch.device("cpu") and installed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"cluster.device: cuda, but no GPU is visible"):
        take_device("cuda", 0)
    assert take_device("auto", 0) == torch.device("cpu") and len(installed) == 2


def test_gpus_that_are_not_here_are_missed_before_anything_starts(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_placement(settings_of("cuda", ranks=2))
    check_placement(settings_of("cpu", ranks=8))
    with pytest.raises(ValueError, match=r"cluster.num_trainer_ranks: 3 ranks need a GPU each, 2 are visible"):
        check_placement(settings_of("auto", ranks=3))
    with pytest.raises(ValueError, match=r"rollout.num_engines x rollout.tp: .* need 3 GPUs, 2 are visible"):
        check_placement(settings_of("cuda", ranks=2, engine="sglang"))
    check_placement(settings_of("cuda", ranks=2, engine="sglang", endpoints=["http://elsewhere"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finetuning = config_of("cuda")
    with pytest.raises(ValueError, match=r"cluster.device: cuda, but no GPU is visible"):
        check_placement(EngineSettings.of(replace(finetuning, finetune=replace(finetuning.finetune, objective="sft"))))


def test_importing_changes_nothing_and_installing_after_megatron_is_refused() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "must be installed before Megatron is imported" in done.stdout
