"""Images beside token ids, in the one form that engines of rlx take them. It runs inside an engine as well and knows torch,
numpy and Pillow only, since servers may live in another environment than rlx.

``image_data`` of a request is a list of texts, one an image in the order in which they stand in ``input_ids`` (texts, since newer
SGLang refuses objects whose fields it does not know):

    rlx_images:{"form": 1, "key": SHA-256 of the file, "start": S, "grid": [t, h, w], "path": FILE  or  "data": its base64}

The ids are expanded: from ``start`` on stands one placeholder for each merged patch. They are used as they are, and only spans
make images of them: the same id elsewhere is text. The file has the size of its grid already, so that nobody resizes it. Anything
that does not fit is a ValueError, which servers answer with HTTP 400.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FORM = 1
NAME = "rlx_images"
_PREFIX = f"{NAME}:"
# A request with an image that nobody has; the answer tells whether a server has this code, and which form it knows.
PROBE = f'{_PREFIX}{{"form": 0}}'
KNOWS_FORM = f"this engine knows form {FORM} of {NAME}"
# Begins the refusal of an image whose file is not here as it should be; sending the bytes instead helps.
NO_SUCH_FILE = f"{NAME}: no file for image"

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEntry:
    """One image of a request, checked but for its content: tokens ``start`` to ``end`` - 1 stand for it."""

    key: str
    start: int
    end: int
    grid: Grid
    path: str | None
    data: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """How a tower wants its pixels: in squares of ``size``, in groups of ``merge`` by ``merge``, ``frames`` times, normalised."""

    size: int
    merge: int
    frames: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Mapping[str, Any]) -> Patches:
        """By the fields of ``preprocessor_config.json``, or by an image processor's attributes."""
        return cls(
            size=int(processor["patch_size"]),
            merge=int(processor["merge_size"]),
            frames=int(processor["temporal_patch_size"]),
            mean=tuple(map(float, processor["image_mean"])),
            std=tuple(map(float, processor["image_std"])),
        )


def write_entry(key: str, start: int, grid: Grid, **source: str) -> str:
    """One image of a request. ``source`` is ``path`` or ``data``."""
    return _PREFIX + json.dumps({"form": FORM, "key": key, "start": start, "grid": list(grid), **source})


def is_ours(image_data: object) -> bool:
    """Whether a request's images are in this form."""
    return isinstance(image_data, list) and any(isinstance(one, str) and one.startswith(_PREFIX) for one in image_data)


def read_entries(image_data: Sequence[object], input_ids: Sequence[int], image_token: int, merge: int) -> list[ImageEntry]:
    """The images of a request, in order. ValueError says which one does not fit the ids."""
    entries: list[ImageEntry] = []
    for number, text in enumerate(image_data):
        where = f"{NAME}: image_data[{number}]"
        entry = _entry(_fields(text, where), merge, where)
        if entry.start < (entries[-1].end if entries else 0):
            raise ValueError(f"{where} begins at token {entry.start}, inside the image before it")
        stretch = list(input_ids[entry.start : entry.end])
        if stretch != [image_token] * (entry.end - entry.start):
            of = f"input_ids[{entry.start}:{entry.end}] of {len(input_ids)}"
            raise ValueError(f"{where}: {of} are not all image placeholders ({image_token})")
        entries.append(entry)
    return entries


def _fields(text: object, where: str) -> Mapping[str, Any]:
    if text == PROBE:
        raise ValueError(f"{NAME}: asked which form it knows; {KNOWS_FORM}")
    if not isinstance(text, str) or not text.startswith(_PREFIX):
        raise ValueError(f"{where} is {str(text)[:80]!r}; wanted a text that begins with {_PREFIX!r}")
    try:
        found = json.loads(text[len(_PREFIX) :])
    except ValueError as error:
        raise ValueError(f"{where} is not JSON after {_PREFIX!r}: {error}") from error
    if not isinstance(found, dict) or found.get("form") != FORM:
        form = found.get("form") if isinstance(found, dict) else None
        raise ValueError(f"{where} is of form {form!r}; {KNOWS_FORM}")
    return found


def _entry(given: Mapping[str, Any], merge: int, where: str) -> ImageEntry:
    key, start, grid = given.get("key"), given.get("start"), given.get("grid")
    path, data = given.get("path"), given.get("data")
    if not isinstance(key, str) or len(key) != 64:
        raise ValueError(f"{where}: key is {str(key)[:80]!r}; wanted the SHA-256 of its file in hexadecimal")
    if type(start) is not int or start < 0:
        raise ValueError(f"{where}: start is {str(start)[:80]!r}; wanted the place of its first token")
    if not isinstance(grid, list) or len(grid) != 3 or not all(type(extent) is int and extent > 0 for extent in grid):
        raise ValueError(f"{where}: grid is {str(grid)[:80]!r}; wanted the numbers of its patches [t, h, w]")
    if grid[0] != 1 or grid[1] % merge or grid[2] % merge:
        raise ValueError(f"{where}: grid is {grid}; wanted [1, h, w] with h and w multiples of {merge}")
    if (path is None) == (data is None) or not isinstance(path or data, str):
        raise ValueError(f"{where}: wanted exactly one of path and data, as a text")
    end = start + grid[1] * grid[2] // merge**2
    return ImageEntry(key=key, start=start, end=end, grid=(1, grid[1], grid[2]), path=path, data=data)


def content(entry: ImageEntry) -> bytes:
    """The bytes of an image's file, which are those of its key."""
    if entry.path is not None:
        try:
            with open(entry.path, "rb") as file:
                found = file.read()
        except (OSError, ValueError) as error:
            raise ValueError(f"{NO_SUCH_FILE} {entry.key}: {entry.path!r}: {error}") from error
    else:
        try:
            found = base64.b64decode(entry.data or "", validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{NAME}: data of image {entry.key} is no base64: {error}") from error
    if hashlib.sha256(found).hexdigest() != entry.key:
        what = "the bytes sent" if entry.path is None else entry.path
        begin = NAME if entry.path is None else NO_SUCH_FILE
        raise ValueError(f"{begin}: {what} of {len(found)} bytes are not those of the key {entry.key}")
    return found


def pixels(file: bytes, entry: ImageEntry, patches: Patches) -> Tensor:
    """float32 [h x w, 3 x frames x size x size]: the patches of an image, those that are merged side by side."""
    height, width = entry.grid[1] * patches.size, entry.grid[2] * patches.size
    try:
        with Image.open(io.BytesIO(file)) as image:
            if (image.width, image.height) != (width, height):
                raise ValueError(
                    f"it has {image.width} x {image.height} pixels, which the grid {list(entry.grid)} of the request does not"
                    f" fit: with patches of {patches.size} it stands for {width} x {height}"
                )
            array = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{NAME}: image {entry.key} cannot be used: {error}") from error
    return patch_rows(array, patches)


def patch_rows(image: np.ndarray[Any, Any], patches: Patches) -> Tensor:
    """The same of pixels uint8 [H, W, 3]."""
    # As transformers does it: scaled to 0..1 first, then normalised, each in float32.
    scaled = (image.astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(patches.mean, dtype=np.float32), np.array(patches.std, dtype=np.float32)
    found = torch.from_numpy((scaled - mean) / std)
    size, merge = patches.size, patches.merge
    rows, columns = image.shape[0] // (size * merge), image.shape[1] // (size * merge)
    # [row, merged row, y, column, merged column, x, colour] -> one row a patch, merged ones together, colours outside.
    found = found.view(rows, merge, size, columns, merge, size, 3).permute(0, 3, 1, 4, 6, 2, 5)
    found = found.unsqueeze(5).expand(-1, -1, -1, -1, -1, patches.frames, -1, -1)
    return found.reshape(rows * merge * columns * merge, -1).contiguous()


def positions(length: int, spans: Sequence[tuple[int, Grid]], merge: int) -> Tensor:
    """int64 [3, length]: where each token is in time, down and across; of text all three are one number.

    ``spans``: start and grid of each image. The token after the last one is at the largest number so far, plus 1.
    """
    found = torch.empty(3, length, dtype=torch.long)
    at = upcoming = 0
    for start, (time, height, width) in spans:
        found[:, at:start] = torch.arange(upcoming, upcoming + start - at)
        upcoming += start - at
        down, across = height // merge, width // merge
        axes = torch.cartesian_prod(torch.arange(time), torch.arange(down), torch.arange(across)).view(-1, 3)
        at = start + len(axes)
        found[:, start:at] = axes.T + upcoming
        upcoming += max(time, down, across)
    found[:, at:] = torch.arange(upcoming, upcoming + length - at)
    return found
