"""Hub ids for models and data, against a hub on this machine: what is downloaded, and what is said when it cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from converters.__main__ import main as convert
from rlx.cli.main import main
from rlx.config.hub.located import data_path, model_folder
from rlx.config.hub.splits import split_files
from rlx.config.load import ConfigError, load_config
from rlx.data.rows import read_rows
from tests.unit.config.hub_server import HubServer, commit_of


def rows(*labels: str) -> bytes:
    return b"".join(json.dumps({"prompt": "a", "label": label}).encode() + b"\n" for label in labels)


def parquet(*labels: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "label": label} for label in labels]), sink)
    return bytes(sink.getvalue())


SHAPE = {
    "model_type": "qwen2",
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "hidden_size": 96,
    "intermediate_size": 240,
    "vocab_size": 131,
    "max_position_embeddings": 4096,
}
MODEL = {
    "config.json": json.dumps(SHAPE).encode(),
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "original/consolidated.00.pth": b"other",
    "onnx/model.safetensors": b"other",
    "pytorch_model.bin": b"other",
}
CONFIGS = b"""---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: [main/test-*]}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
# A data set
"""
REPOS = {
    ("models", "some-one/small.model", "main"): MODEL,
    ("datasets", "some-one/plain", "main"): {"train.jsonl": rows("1", "2"), "test.jsonl": rows("3"), "README.md": b"# nothing"},
    ("datasets", "some-one/sharded", "main"): {
        f"data/{split}-0000{part}-of-00002.parquet": parquet(f"{split}{part}") for split in ("train", "test") for part in (1, 0)
    },
    ("datasets", "some-one/configured", "main"): {
        "README.md": CONFIGS,
        "main/train-0.parquet": parquet("main"),
        "main/test-0.parquet": parquet("test"),
        "socratic/train-0.parquet": parquet("socratic"),
    },
    ("datasets", "some-one/csv", "main"): {"train.csv": b"prompt\na\n"},
    ("datasets", "some-one/csv", "refs/convert/parquet"): {"default/train/0000.parquet": parquet("converted")},
    ("datasets", "some-one/none", "main"): {"notes.txt": b"nothing"},
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(REPOS) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield server


def test_a_model_is_downloaded_once_and_without_what_nobody_reads(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder("model.path", "some-one/small.model")
    assert sorted(path.name for path in folder.rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert folder.name == commit_of("models", "some-one/small.model", "main")
    assert f"model.path: some-one/small.model is {folder}" in capsys.readouterr().err
    asked = len(hub.requests)
    assert model_folder("model.path", "some-one/small.model") == folder
    assert not any("/resolve/" in path for path in hub.requests[asked:])


def test_a_tokenizer_comes_without_weights(hub: HubServer) -> None:
    folder = model_folder("model.tokenizer_path", "some-one/small.model", weights=False)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]


def labels(path: str) -> list[object]:
    return [row["label"] for _, row in read_rows(path)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("some-one/plain", ["1", "2"]),
        ("some-one/plain:train", ["1", "2"]),
        ("some-one/plain:test", ["3"]),
        ("some-one/sharded", ["train0", "train1"]),
        ("some-one/sharded:test", ["test0", "test1"]),
        ("some-one/configured:main/train", ["main"]),
        ("some-one/configured:socratic/train", ["socratic"]),
        ("some-one/configured:main/test", ["test"]),
        ("some-one/csv:train", ["converted"]),
    ],
)
def test_a_split_is_read_as_a_file_is(hub: HubServer, monkeypatch: pytest.MonkeyPatch, name: str, expected: list[str]) -> None:
    path = data_path("data.train", name)
    assert labels(path) == expected
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert data_path("data.train", name) == path, "what is here needs no network"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("some-one/plain:dev", "the data set has no dev; name one of :test, :train"),
        ("some-one/configured", "the data set has several train; name one of :main/test, :main/train, :socratic/train"),
        ("some-one/none", "holds no .parquet or .jsonl files"),
        ("some-one/missing", "cannot be downloaded from the hub"),
    ],
)
def test_a_split_that_is_not_there_is_said_with_those_that_are(hub: HubServer, name: str, words: str) -> None:
    with pytest.raises((ValueError, ConnectionError), match=r"^data\.train: ") as caught:
        data_path("data.train", name)
    assert words in str(caught.value)


def test_a_configuration_names_ids_and_records_paths(hub: HubServer, run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "model.path=some-one/small.model",
        "model.tokenizer_path=some-one/small.model",
        "data.train=some-one/plain",
        "evaluation.data=some-one/plain:test",
        "evaluation.sets={more: {path: some-one/sharded}}",
    ]
    config = load_config(run_yaml, overrides)
    assert Path(config.model.path, "model.safetensors").read_bytes() == b"weights"
    assert config.data.train is not None and config.evaluation.data is not None
    assert labels(config.data.train) == ["1", "2"] and labels(config.evaluation.data) == ["3"]
    assert labels(config.evaluation.sets["more"].path) == ["train0", "train1"]
    assert load_config(run_yaml, [f"model.path={config.model.path}"]).model.path == config.model.path
    with pytest.raises(ConfigError) as caught:
        load_config(run_yaml, ["model.path=some-one/missing", "data.train=some-one/plain:dev", "run.steps=0"])
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == ["run.steps", "model.path", "data.train"]


def test_other_programs_take_ids_too(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tmp_path / "in.jsonl"
    tokens.write_text('{"input_ids": [500]}\n')
    assert main(["score", "--model", "some-one/small.model", "--tokens", str(tokens), "--out", str(tmp_path / "out")]) == 2
    assert "in.jsonl:1: token 500 is outside the vocabulary of 131" in capsys.readouterr().err
    assert convert(["hf-to-megatron", "--hf", "some-one/small.model", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert main(["score", "--model", "some-one/missing", "--tokens", str(tokens), "--out", "o"]) == 2
    assert "--model: some-one/missing: no such folder, and it cannot be downloaded" in capsys.readouterr().err
    assert convert(["hf-to-megatron", "--hf", "some-one/missing", "--out", str(tmp_path / "out")]) == 1


def test_without_a_network_the_key_and_what_would_be_right_are_said(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(run_yaml.parent / "cache"))
    with pytest.raises(ConfigError) as caught:
        load_config(run_yaml, ["model.path=some-one/model", "data.train=some-one/data:test"])
    model, data = caught.value.problems
    assert model.startswith("model.path: some-one/model: no such folder") and data.startswith(
        "data.train: some-one/data: no such file"
    )
    assert all("give a path, or an id of the hub" in problem for problem in (model, data))


@pytest.mark.parametrize("name", ["/no/where", "nowhere", "./a/b", "a/b/c", "a//b", "~/model", "a/b:c"])
def test_paths_are_no_ids(hub: HubServer, run_yaml: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(run_yaml, [f"model.path={name}"])
    with pytest.raises(ConfigError, match=r"data\.train: no such file"):
        load_config(run_yaml, [f"data.train={name.partition(':')[0]}.jsonl"])
    assert not hub.requests


NAMES = ["README.md", "train.csv", "data/train-0.parquet", "data/validation-0.parquet", "extra/eval.jsonl"]


@pytest.mark.parametrize(
    ("names", "readme", "wanted", "files"),
    [
        (NAMES[:2], "", None, None),
        (NAMES, "", "validation", ["data/validation-0.parquet"]),
        (NAMES, "", "extra/eval", ["extra/eval.jsonl"]),
        (["a.jsonl", "b.jsonl"], "", None, ["a.jsonl", "b.jsonl"]),
        (["b.jsonl", "a.jsonl"], "---\nconfigs:\n- data_files: b.jsonl\n---", None, ["b.jsonl"]),
        (NAMES, "---\nconfigs:\n- {config_name: x, data_dir: data}\n---\n", "validation", ["data/validation-0.parquet"]),
        (NAMES, "---\nconfigs:\n- {config_name: x, data_dir: extra, data_files: '*.jsonl'}\n---\n", None, ["extra/eval.jsonl"]),
        (NAMES, "---\nconfigs:\n- data_files:\n  - {split: all, path: '**/*.parquet'}\n---\n", "all", NAMES[2:4]),
        (NAMES, "---\n: [\n---\n", "train", ["data/train-0.parquet"]),
        (NAMES, "---\nconfigs: 3\n---\n", "train", ["data/train-0.parquet"]),
        (NAMES, "---\nconfigs: [3, {data_files: [{}, {path: 5}]}]\n---\n", "train", ["data/train-0.parquet"]),
    ],
)  # fmt: skip
def test_files_of_a_split(names: list[str], readme: str, wanted: str | None, files: list[str] | None) -> None:
    assert split_files(names, readme, wanted) == files
