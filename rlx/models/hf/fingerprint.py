"""What a model folder holds, in three short words that can be compared later: configuration, tensors, their content; and what
a run began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlx.config.parts import LoadedModel
from rlx.data.tokenizer import tokenizer_fingerprint
from rlx.models.hf.files import HfFiles

# Where a model came from and who wrote the file, not what it is.
_VOLATILE = ("transformers_version", "torch_dtype", "dtype", "architectures")
_SAMPLED_TENSORS, _SAMPLED_BYTES = 512, 16 * 1024


def model_fingerprint(folder: str) -> dict[str, str]:
    """``config.json`` by its fields, ``tensors`` by names, shapes and types, ``weights`` by a sample of some MiB spread over the
    tensors. The same however a checkpoint is cut into files. ValueError, OSError: a folder that cannot be read."""
    path = Path(folder)
    found = {"config.json": _digest(_meant(json.loads((path / "config.json").read_text(encoding="utf-8"))))}
    if (path / "metadata.json").is_file():  # a converted checkpoint
        return found | _of_files(sorted([*path.glob("*.distcp"), path / "metadata.json"]))
    files = HfFiles(path)
    try:
        stored = [(name, files.tensor(name)) for name in sorted(files.files)]
        sample = hashlib.blake2b(digest_size=16)
        for name, tensor in stored[:: max(1, len(stored) // _SAMPLED_TENSORS)]:
            piece = bytearray(min(_SAMPLED_BYTES, tensor.num_bytes))
            files.fill(tensor, memoryview(piece), tensor.start + (tensor.num_bytes - len(piece)) // 2)
            sample.update(name.encode() + piece)
    finally:
        files.close()
    return found | {
        "tensors": _digest([(name, tensor.shape, tensor.dtype) for name, tensor in stored]),
        "weights": sample.hexdigest(),
    }


def origin_of(models: Mapping[str, LoadedModel], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a run's models and tokenizer are: for each key the folder and what is in it, to be known again when it goes on."""
    prints = {folder: model_fingerprint(folder) for folder in {model.folder for model in models.values()}}
    found: dict[str, Any] = {key: {"folder": model.folder, **prints[model.folder]} for key, model in models.items()}
    return found | {"tokenizer": tokenizer_fingerprint(tokenizer)}


def _of_files(paths: list[Path]) -> dict[str, str]:
    sample = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size // 2 - 2**19))
            sample.update(stream.read(2**20))
    return {"tensors": _digest([(path.name, path.stat().st_size) for path in paths]), "weights": sample.hexdigest()}


def _meant(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _VOLATILE and not name.startswith("_")}


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
