"""Images in their canonical form, and what a vision tower takes of one.

The canonical file of an image is a lossless PNG in RGB, already of its final size (sides are multiples of a merged patch), so
that whoever reads it, trainer or engine, has the same pixels to the bit. It lies in ``FOLDER/<first two digits>/<key>.png``,
where ``key`` is the SHA-256 of the file's bytes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlx.arch.vision import CHANNELS, Vision
from rlx.types.rollout import ImageSpan

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images (Radford et al. 2021), which every tower here was trained with."""


def image_folder(run_dir: str | Path) -> Path:
    """Where a run keeps its images."""
    return Path(run_dir) / "images"


def image_file(folder: Path, key: str) -> Path:
    """The canonical file of the image with this key."""
    return folder / key[:2] / f"{key}.png"


def image_grid(file: Path, vision: Vision) -> tuple[int, int, int]:
    """The grid of a canonical image. ValueError says what is in the way of it being one."""
    height, width, _ = _decoded(file).shape
    side = vision.patch * vision.merge
    if height % side or width % side:
        raise ValueError(f"{file} has {width} x {height} pixels; both must be multiples of {side}")
    return 1, height // vision.patch, width // vision.patch


def pixels(file: Path, span: ImageSpan, vision: Vision) -> NDArray[np.float32]:
    """The image's patches, [patches, numbers of a patch], as transformers' image processor makes them of an image that needs no
    resizing: merged patches in rows, each one's patches in rows. ValueError names a file that is missing, broken or of another
    grid."""
    grid = image_grid(file, vision)
    if grid != span.grid:
        raise ValueError(f"{file} has the grid {grid}; its place is for {span.grid}")
    normalised = _TABLE[np.arange(CHANNELS), _decoded(file)]
    _, height, width = grid
    cut = normalised.reshape(
        height // vision.merge, vision.merge, vision.patch, width // vision.merge, vision.merge, vision.patch, CHANNELS
    ).transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.repeat(cut[:, :, :, :, :, None], vision.temporal, axis=5)
    return frames.reshape(height * width, vision.patch_size)


# An image is wanted by every pass over its batch: scored by two models, learnt from once or more.
@lru_cache(maxsize=256)
def _decoded(file: Path) -> NDArray[np.uint8]:
    """Grey levels, [height, width, 3]."""
    try:
        with Image.open(file) as image:
            if image.format != "PNG" or image.mode != "RGB":
                raise ValueError(f"{file} is {image.format} in {image.mode}; canonical images are PNG in RGB")
            return np.asarray(image)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _table() -> NDArray[np.float32]:
    """The number that a grey level becomes, [3, 256], rounded where transformers rounds."""
    levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    return (levels - mean[:, None]) / std[:, None]


_TABLE = _table()
