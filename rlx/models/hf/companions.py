"""The small files beside the weights (configuration, tokenizer, chat template), which go wherever a model goes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "rlx_manifest.json"
"""What a converted checkpoint says about itself."""

# What describes how weights lie in files: true of one folder only.
_OF_WEIGHTS = {MANIFEST, "metadata.json"}
_SUFFIXES = {".json", ".txt", ".jinja", ".model"}


def companions(folder: Path) -> Iterator[Path]:
    """The files of a model folder that describe the model and its tokenizer, not its weights."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _SUFFIXES and file.name not in _OF_WEIGHTS and not file.name.endswith(".index.json"):
            yield file


def copy_companions(source: Path, target: Path) -> None:
    """Copy them; both folders exist."""
    for file in companions(source):
        shutil.copy(file, target / file.name)
