"""What engines of FP8 weights start from, what they are started with, and which machines are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rlx.arch.engine_format import QUANTIZATION, engine_format
from rlx.arch.families.registry import read_architecture
from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, Config, DataConfig, ModelConfig, RolloutConfig
from rlx.engines.engine_plan import EngineSite, plan_engine
from rlx.engines.fp8 import check_fp8, write_fp8_folder
from rlx.models.hf import blank
from rlx.models.hf.files import HfFiles
from rlx.rollout.keys import EngineKeys
from rlx.rollout.server_args import server_args
from rlx.sync.engine_tensors import FP8
from tests.tiny import SHAPE, write_model

WIDE = SHAPE | {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 8, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    model = write_model(tmp_path / "model", WIDE)
    config = Config(
        cluster=ClusterConfig(device="cuda"),
        model=ModelConfig(path=str(model), dtype="bf16"),
        data=DataConfig(train="t.jsonl"),
        rollout=RolloutConfig(engine="sglang", fp8=True),
    )
    return EngineSettings.of(config)


def tell_capability(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{text}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_the_folder_is_a_model_of_zeros_that_takes_no_room(
    settings: EngineSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blank, "_FILE_BYTES", 100_000)
    (tmp_path / "run").mkdir()
    for _ in range(2):  # an engine that is started again reads it anew
        folder = write_fp8_folder(settings, tmp_path / "run")
    assert folder == tmp_path / "run" / "engines" / "fp8" and [each.name for each in folder.parent.iterdir()] == ["fp8"]
    wanted, files = engine_format(read_architecture(settings.model_path), fp8=True), HfFiles(folder)
    assert {name: files.shape(name) for name in files.files} == dict(wanted.expected)
    assert {name: files.tensor(name).dtype for name in files.files} == {
        **dict.fromkeys(wanted.shapes, "bfloat16"),
        **wanted.dtypes,
    }
    assert files.dtype == "bfloat16" and len(set(files.files.values())) > 2
    for name in set(files.files.values()):
        with safe_open(folder / name, framework="pt") as opened:
            for tensor in (each for each, file in files.files.items() if file == name):
                found = opened.get_tensor(tensor)
                assert not found.view(torch.uint8).any() and (found.dtype == FP8) == (tensor in wanted.converted)
        assert (folder / name).stat().st_blocks * 512 < 40_000
    described = json.loads((folder / "config.json").read_text())
    assert described["quantization_config"] == QUANTIZATION and described["dtype"] == described["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_a_server_starts_from_it_without_kernels_of_its_own_making(
    settings: EngineSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_capability(tmp_path, monkeypatch, "echo 9.0; echo 8.9")
    monkeypatch.setattr("rlx.engines.engine_plan.check_nccl", lambda python: None)
    for given, wanted in ({}, "0"), ({"SGLANG_ENABLE_JIT_DEEPGEMM": "1"}, "1"):
        env = {"PYTHONPATH": "x", **given}
        site = EngineSite(index=0, run_dir=tmp_path / "run", parent_pipe=0, env=env, keys=EngineKeys(), gpus=("1",))
        site.run_dir.mkdir(exist_ok=True)
        plan = plan_engine(settings, site)
        assert plan.argv[plan.argv.index("--model-path") + 1] == str(tmp_path / "run" / "engines" / "fp8")
        assert plan.argv[plan.argv.index("--dtype") + 1] == "bfloat16" and "--load-format" not in plan.argv
        assert plan.env["SGLANG_ENABLE_JIT_DEEPGEMM"] == wanted


def test_gpus_without_fp8_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_capability(tmp_path, monkeypatch, "echo 9.0; echo 8.0")
    with pytest.raises(ValueError, match=r"rollout\.fp8: GPU 1 has compute capability 8\.0; FP8 needs 8\.9"):
        check_fp8("cuda")
    with pytest.raises(ValueError, match=r"rollout\.fp8: engines of FP8 weights need GPUs"):
        check_fp8("cpu")
    for silent in ("exit 9", "echo N/A"):
        tell_capability(tmp_path, monkeypatch, silent)
        check_fp8("cuda")  # SGLang says it then
    monkeypatch.setattr("rlx.engines.fp8.shutil.which", lambda tool: None)
    check_fp8("cuda")


@pytest.mark.parametrize("name", ["quantization", "load-format"])
def test_how_weights_are_held_is_not_said_twice(name: str) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.server_args\.{name.replace('-', '_')} is set by rlx itself"):
        server_args(RolloutConfig(engine="sglang", fp8=True, server_args={name: "fp8"}))
    server_args(RolloutConfig(engine="sglang", server_args={name: "dummy"}))
