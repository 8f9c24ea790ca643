"""Folders that readers would read differently are refused at every entrance, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.__main__ import main as convert
from rlx.arch.families.registry import read_architecture
from rlx.cli.main import main
from rlx.cluster.checks.models import weight_warnings
from rlx.cluster.preflight import preflight
from rlx.config.load import ConfigError
from rlx.config.schema import Config, DataConfig, ModelConfig, RewardConfig
from rlx.models.hf.whole import tensors_left_out
from tests.dist.checkpoints import make_qwen2


def older_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "old.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head = torch.ones_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})


def score(folder: Path) -> int:
    (folder / "in.jsonl").write_text('{"input_ids": [1, 2]}\n')
    return main(["score", "--model", str(folder), "--tokens", str(folder / "in.jsonl"), "--out", str(folder / "out.jsonl")])


def train(folder: Path) -> int:
    """What every command that trains does first."""
    with pytest.raises(ConfigError) as caught:
        preflight(
            Config(model=ModelConfig(path=str(folder)), data=DataConfig(train="none.jsonl"), reward=RewardConfig(name="exact"))
        )
    print([problem for problem in caught.value.problems if problem.startswith("model.path")])
    return 2


def to_megatron(folder: Path) -> int:
    return convert(["hf-to-megatron", "--hf", str(folder), "--out", str(folder / "out"), "--tokenizer", "none"])


@pytest.mark.parametrize("enter", [score, train, to_megatron])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (older_index, ["model.safetensors.index.json", "transformers loads model.safetensors"]),
        (other_head, ["lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings"]),
    ],
)
def test_no_entrance_takes_it(
    tmp_path: Path,
    spoil: Callable[[Path], None],
    words: list[str],
    enter: Callable[[Path], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_qwen2(tmp_path / "model", num_layers=1)
    spoil(folder)
    assert enter(folder) == 2
    out, err = capsys.readouterr()
    assert all(word in out + err for word in words), out + err
    assert not (folder / "out").exists() and not (folder / "out.jsonl").exists()


def test_scores_that_are_no_numbers_are_no_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_qwen2(tmp_path / "model", num_layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert score(folder) == 1
    assert "log-probs of line 1 are not finite" in capfd.readouterr().err
    assert not (folder / "out.jsonl").exists()


def test_tensors_that_nobody_reads_are_said(tmp_path: Path) -> None:
    """Of the layers: a head of another kind or a buffer of old exports is no sign of another model."""
    folder = make_qwen2(tmp_path / "model", num_layers=1)
    arch, tensors = read_architecture(folder), load_file(folder / "model.safetensors")
    assert tensors_left_out(folder, arch) == []
    kept = ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight", "model.layers.1.mlp.up_proj.weight"]
    left = ["model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.up_proj.bias"]
    save_file(tensors | {name: torch.ones(2) for name in kept + left}, folder / "model.safetensors", metadata={"format": "pt"})
    assert tensors_left_out(folder, arch) == sorted(left)
    (said,) = weight_warnings(str(folder), arch)
    assert said.startswith(f"model.path: {folder} holds 2 tensors of layers") and sorted(left)[0] in said
    (folder / "model.safetensors").unlink()
    assert not list(weight_warnings(str(folder), arch))
