"""Reads slices of tensors out of a Hugging Face folder of safetensors files, without loading the rest."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import torch
from torch import Tensor

from rlx.models.hf.files import HfFiles, itemsize
from rlx.types.weights import torch_dtype as torch_dtype


class HfFolder(HfFiles):
    """``HfFiles`` as tensors; ``bytes_read`` counts."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.bytes_read = 0
        self._count_lock = threading.Lock()

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The slice [start:stop] along ``dim``, in the file's own dtype."""
        stored = self.tensor(name)
        assert 0 <= start <= stop <= stored.shape[dim], (name, dim, start, stop)
        shape = (*stored.shape[:dim], stop - start, *stored.shape[dim + 1 :])
        result = torch.empty(shape, dtype=torch_dtype(stored.dtype))
        inner = math.prod(stored.shape[dim + 1 :]) * itemsize(stored.dtype)
        run, step = (stop - start) * inner, stored.shape[dim] * inner
        rows = math.prod(stored.shape[:dim])
        if run == step:
            rows, run = 1, rows * run
        buffer = memoryview(result.view(-1).view(torch.uint8).numpy()) if run * rows else memoryview(b"")
        for row in range(rows if run else 0):
            self.fill(stored, buffer[row * run : (row + 1) * run], stored.start + row * step + start * inner)
        with self._count_lock:
            self.bytes_read += run * rows
        return result
