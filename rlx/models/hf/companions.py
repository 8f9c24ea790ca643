"""What stands beside a model's weights (configuration, tokenizer, chat template), and goes wherever a model goes.

Everything that writes a model writes these through ``Companions``, so that a folder says of itself what is true of it: the
tokenizer and the chat template that it was used with, and the type that its weights have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

MANIFEST = "rlx_manifest.json"
"""What a converted checkpoint says about itself."""

# What describes how weights lie in files: true of one folder only.
_OF_WEIGHTS = {MANIFEST, "metadata.json"}
_SUFFIXES = {".json", ".txt", ".jinja", ".model"}
_OF_TOKENIZERS = (
    "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece", "chat_template", "normalizer"
)  # fmt: skip
_DTYPE_KEYS = ("dtype", "torch_dtype")  # as transformers writes it now, and as it did


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """The small files of the model in ``folder``, but for its configuration (the file ``config``), its tokenizer (the folder
    ``tokenizer``; None: none) and its chat template (Jinja; None: the tokenizer's own). ``quantization`` is what the
    configuration is to say of weights in another format, None where they are as they are."""

    folder: Path
    config: Path
    tokenizer: Path | None
    chat_template: str | None = None
    quantization: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, folder: str | Path, tokenizer: str | Path | None = None, chat_template: str | Path | None = None) -> Self:
        """A model folder's own, but for the tokenizer's folder and the template's file that are named. The template is read now:
        it is that of a run that may go on for days."""
        return cls(
            folder=Path(folder),
            config=Path(folder) / "config.json",
            tokenizer=Path(tokenizer or folder),
            chat_template=None if chat_template is None else Path(chat_template).read_text(encoding="utf-8"),
        )

    def write(self, target: Path, dtype: str) -> None:
        """Put them into ``target``, whose weights have (most of them) the type that torch calls ``dtype``."""
        for file in _small_files(self.folder):
            if not file.name.startswith(_OF_TOKENIZERS):
                shutil.copy(file, target / file.name)
        for file in () if self.tokenizer is None else _small_files(self.tokenizer):
            if file.name.startswith(_OF_TOKENIZERS):
                shutil.copy(file, target / file.name)
        if self.chat_template is not None:
            _write_chat_template(target, self.chat_template)
        generation = self.config.parent / "generation_config.json"
        if generation.is_file() and not (target / generation.name).exists():
            shutil.copy(generation, target / generation.name)
        config = json.loads(self.config.read_text(encoding="utf-8"))
        described = _with_dtype(config, dtype)
        if self.quantization is not None:
            described["quantization_config"] = dict(self.quantization)
        if described == config:
            shutil.copy(self.config, target / "config.json")
        else:
            _write_json(target / "config.json", described)


def _small_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _SUFFIXES and file.name not in _OF_WEIGHTS and not file.name.endswith(".index.json"):
            yield file


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The type under every spelling that the configuration has, in nested ones too; under both where it has none."""
    nested = {key: _with_dtype(value, dtype) for key, value in config.items() if isinstance(value, dict) and _says_dtype(value)}
    return {**config, **nested, **dict.fromkeys(_says_dtype(config) or _DTYPE_KEYS, dtype)}


def _says_dtype(config: dict[str, Any]) -> list[str]:
    return [key for key in _DTYPE_KEYS if key in config]


def _write_chat_template(folder: Path, template: str) -> None:
    """In place of any other, wherever a reader looks for it."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        _write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"chat_template": template})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
