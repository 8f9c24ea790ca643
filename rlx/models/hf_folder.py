"""Reads slices of tensors out of a Hugging Face folder of safetensors files, without loading the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HfFolder:
    """One checkpoint, one file or sharded. ValueError names the missing or broken file or tensor."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[str, Any] = {}

    @cached_property
    def files(self) -> Mapping[str, str]:
        """Tensor name to file name."""
        index = self.path / INDEX
        if index.is_file():
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            for missing in sorted({name for name in files.values() if not (self.path / name).is_file()}):
                raise ValueError(f"{index} names {missing}, which is not there")
            return files
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        raise ValueError(f"{self.path} holds neither {INDEX} nor {SINGLE}")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.path / name, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.path / name} cannot be read: {error}") from error
        return self._open[name]

    def _slice(self, name: str) -> Any:
        if name not in self.files:
            raise ValueError(f"{self.path} has no tensor {name}")
        return self._file(self.files[name]).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The slice [start:stop] along ``dim`` (0 or 1), in the file's own dtype."""
        source = self._slice(name)
        tensor: Tensor = source[start:stop] if dim == 0 else source[:, start:stop]
        return tensor
