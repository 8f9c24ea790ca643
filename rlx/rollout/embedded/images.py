"""Images in the embedded engine: read for a request, turned into features by the model's tower, put in their places.

Shapes: B rows, S columns, L tokens of a row, D hidden size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlx.arch.vision import Vision
from rlx.data.images.pixels import MEAN, STD
from rlx.rollout.sglang.image_request import NAME, Grid, Patches, content, is_ours, pixels, positions, read_entries

_KEPT_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """An image on tokens ``start`` to ``end`` - 1 of a prompt, as patches."""

    key: str
    start: int
    end: int
    grid: Grid
    pixels: Tensor


@dataclass(frozen=True, slots=True)
class Shown:
    """Tokens that a model is to read, with their images. What has one ``name`` is one prompt."""

    tokens: list[int]
    pictures: tuple[Picture, ...] = ()

    @property
    def name(self) -> tuple[object, ...]:
        return (*self.tokens, *((picture.key, picture.start) for picture in self.pictures))


class RequestImages:
    """Images of requests by their files or bytes; those last used are kept, for a group asks about the same."""

    def __init__(self, vision: Vision) -> None:
        self._token, self._merge = vision.image_token, vision.merge
        self._patches = Patches(size=vision.patch, merge=vision.merge, frames=vision.temporal, mean=MEAN, std=STD)
        self._kept: OrderedDict[tuple[str, Grid], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, image_data: object, tokens: Sequence[int]) -> tuple[Picture, ...]:
        """The images of one prompt. ValueError says what does not fit, and that only rlx's form of ``image_data`` is known."""
        if not image_data:
            return ()
        if not isinstance(image_data, list) or not is_ours(image_data):
            raise ValueError(f"image_data is {str(image_data)[:80]!r}; the embedded engine takes a list of texts '{NAME}:...'")
        entries = read_entries(image_data, tokens, self._token, self._merge)
        found = []
        for entry in entries:
            with self._lock:
                name = (entry.key, entry.grid)
                if name not in self._kept:
                    self._kept[name] = pixels(content(entry), entry, self._patches)
                self._kept.move_to_end(name)
                patches = self._kept[name]
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            found.append(Picture(key=entry.key, start=entry.start, end=entry.end, grid=entry.grid, pixels=patches))
        return tuple(found)


class Sight:
    """The part of a model that sees: a tower, and the embeddings that its features go among."""

    def __init__(self, model: Any, vision: Vision) -> None:
        self._tower, self._embeddings, self._merge = model.model.visual, model.get_input_embeddings(), vision.merge

    def embeddings(self, tokens: Tensor, rows: Sequence[Shown]) -> Tensor:
        """[B, S, D] of left-padded ``tokens`` [B, S]; an image that several rows show is computed once."""
        found: Tensor = self._embeddings(tokens)
        different = {picture.key: picture for row in rows for picture in row.pictures}
        if not different:
            return found
        grids = torch.tensor([picture.grid for picture in different.values()], device=tokens.device)
        patches = torch.cat([picture.pixels for picture in different.values()]).to(tokens.device, found.dtype)
        features = self._tower(patches, grid_thw=grids).pooler_output
        by_key = dict(zip(different, features.split((grids.prod(-1) // self._merge**2).tolist()), strict=True))
        found = found.clone()
        for number, row in enumerate(rows):
            offset = tokens.shape[1] - len(row.tokens)
            for picture in row.pictures:
                found[number, offset + picture.start : offset + picture.end] = by_key[picture.key].to(found.dtype)
        return found

    def positions(self, rows: Sequence[Shown], width: int) -> npt.NDArray[np.int64]:
        """[3, B, S] of left-padded rows: along time, down and across."""
        found = np.zeros((3, len(rows), width), dtype=np.int64)
        for number, row in enumerate(rows):
            spans = [(picture.start, picture.grid) for picture in row.pictures]
            found[:, number, width - len(row.tokens) :] = positions(len(row.tokens), spans, self._merge).numpy()
        return found
