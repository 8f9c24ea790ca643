"""The keys and values of a batch whose rows come and go.

Rows are padded on the left, so that the newest token of every row is in the last column and one decoding step appends
one column to all. Shapes: B rows, H key/value heads, S columns, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache


@dataclass(slots=True, eq=False)
class KeyValues:
    """``cache`` holds [B, H, S, D] keys and values of each layer; row b is real in its last ``lengths[b]`` columns, and its next
    token stands at the position ``lengths[b] + shifts[b]`` (images take up other numbers of tokens and positions)."""

    cache: DynamicCache
    lengths: npt.NDArray[np.int64]
    shifts: npt.NDArray[np.int64]

    @property
    def width(self) -> int:
        return int(self.cache.get_seq_length())

    @property
    def padded(self) -> bool:
        return bool((self.lengths != self.width).any())

    def select(self, rows: npt.NDArray[np.int64]) -> None:
        """Keep these rows in this order (a row may come several times) and drop columns that no row uses any more."""
        self.lengths, self.shifts = self.lengths[rows], self.shifts[rows]
        unused = self.width - int(self.lengths.max())
        for layer in _layers(self.cache):
            index = torch.from_numpy(rows).to(layer.keys.device)
            layer.keys = layer.keys[:, :, unused:].index_select(0, index)
            layer.values = layer.values[:, :, unused:].index_select(0, index)

    def join(self, other: KeyValues) -> None:
        """Append the rows of ``other`` below these."""
        width = max(self.width, other.width)
        for mine, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            mine.keys = torch.cat([_widen(mine.keys, width), _widen(theirs.keys, width)])
            mine.values = torch.cat([_widen(mine.values, width), _widen(theirs.values, width)])
        self.lengths = np.concatenate([self.lengths, other.lengths])
        self.shifts = np.concatenate([self.shifts, other.shifts])


def new_cache() -> DynamicCache:
    """An empty cache that keeps every column, sliding-window layers included: their window is cut by the mask."""
    return DynamicCache()


def attention_mask(lengths: npt.NDArray[np.int64], width: int, device: torch.device) -> Tensor | None:
    """The [B, width] mask of left-padded rows; None when no row is padded, which lets attention take its fast path."""
    if (lengths == width).all():
        return None
    return torch.from_numpy((np.arange(width) >= width - lengths[:, None]).astype(np.int64)).to(device)


def _layers(cache: DynamicCache) -> list[Any]:
    """The layers, filled; typed loosely because transformers types their tensors as optional."""
    return list(cache.layers)


def _widen(tensor: Tensor, width: int) -> Tensor:
    return pad(tensor, (0, 0, width - tensor.shape[2], 0)) if tensor.shape[2] < width else tensor
