"""The small files beside the weights: whose they are, and what they say of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlx.models.hf.companions import Companions


def folder_of(path: Path, **files: Any) -> Path:
    """JSON files by name; text as it is."""
    path.mkdir()
    for name, content in files.items():
        name = name.replace("__", ".")
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def written(companions: Companions, target: Path, dtype: str = "bfloat16") -> dict[str, Any]:
    target.mkdir()
    companions.write(target, dtype)
    return {
        file.name: json.loads(file.read_text()) if file.suffix == ".json" else file.read_text()
        for file in sorted(target.iterdir())
    }


@pytest.mark.parametrize(
    ("config", "described"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": None}, {"dtype": "bfloat16"}),
        ({"dtype": "float16", "torch_dtype": "float16"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"a": 1}, {"a": 1, "dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32", "b": {}}, "c": {"d": 2}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "b": {}}, "c": {"d": 2}},
        ),
    ],
)
def test_the_configuration_says_the_type(tmp_path: Path, config: dict[str, Any], described: dict[str, Any]) -> None:
    model = folder_of(tmp_path / "model", config__json=config)
    assert written(Companions.of(model), tmp_path / "out")["config.json"] == described


def test_what_is_right_already_keeps_its_bytes(tmp_path: Path) -> None:
    text = '{ "torch_dtype":"bfloat16","a" : 1}'
    model = folder_of(tmp_path / "model", config__json=text)
    written(Companions.of(model), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text


MODEL = {
    "config__json": {"dtype": "bfloat16"}, "generation_config__json": {"of": "model"}, "tokenizer__json": {"of": "model"},
    "vocab__json": {"of": "model"}, "chat_template__jinja": "of model", "LICENSE__txt": "free", "rlx_manifest__json": {},
    "model__safetensors__index__json": {}, "weights__bin": "no",
}  # fmt: skip
TOKENIZER = {
    "config__json": {"dtype": "float64"}, "generation_config__json": {"of": "tokenizer"}, "tokenizer__json": {"of": "tokenizer"},
    "tokenizer_config__json": {"chat_template": "of tokenizer", "a": 1}, "chat_template__json": {"chat_template": "older"},
}  # fmt: skip
OF_MODEL = {"config.json": {"dtype": "bfloat16"}, "generation_config.json": {"of": "model"}, "LICENSE.txt": "free"}


def test_a_tokenizer_of_its_own_leaves_nothing_of_the_models(tmp_path: Path) -> None:
    model, tokenizer = folder_of(tmp_path / "model", **MODEL), folder_of(tmp_path / "tokenizer", **TOKENIZER)
    found = written(Companions.of(model), tmp_path / "own")
    assert found == {
        **OF_MODEL, "tokenizer.json": {"of": "model"}, "vocab.json": {"of": "model"}, "chat_template.jinja": "of model"
    }  # fmt: skip
    found = written(Companions.of(model, tokenizer), tmp_path / "other")
    assert found == {
        **OF_MODEL,
        "tokenizer.json": {"of": "tokenizer"},
        "tokenizer_config.json": TOKENIZER["tokenizer_config__json"],
        "chat_template.json": {"chat_template": "older"},
    }
    (tmp_path / "mine.jinja").write_text("mine é")
    found = written(Companions.of(model, tokenizer, tmp_path / "mine.jinja"), tmp_path / "template")
    assert found["chat_template.jinja"] == "mine é" and "chat_template.json" not in found
    assert found["tokenizer_config.json"] == {"chat_template": "mine é", "a": 1}
    found = written(Companions(folder=model, config=model / "config.json", tokenizer=None), tmp_path / "none")
    assert found == OF_MODEL
