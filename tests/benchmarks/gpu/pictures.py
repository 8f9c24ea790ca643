"""Sequences with pictures of noise, for the measurements."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rlx.arch.vision import Vision
from rlx.data.images.grid import num_image_tokens
from rlx.data.images.pixels import image_file
from rlx.types.rollout import ImageSpan
from rlx.types.train_batch import TrainSample
from tests.batches import train_sample

GROUP = 8  # answers to one prompt


@dataclass(frozen=True, kw_only=True)
class Size:
    """``side`` of an image in pixels; tokens of a sequence: of its image, ``around`` that in the prompt, ``answer``."""

    shape: str
    side: int
    around: int
    answer: int
    num_sequences: int
    tower_images: int

    def length(self, vision: Vision) -> int:
        """Tokens of a sequence."""
        return num_image_tokens(self.grid(vision), vision.merge) + self.around + self.answer

    def grid(self, vision: Vision) -> tuple[int, int, int]:
        return 1, self.side // vision.patch, self.side // vision.patch


# 896 pixels are 64 x 64 patches, 1,024 tokens: sequences of 2,048.
WHOLE = Size(shape="vl-3B", side=896, around=64, answer=960, num_sequences=16, tower_images=8)
TINY = Size(shape="vl-tiny", side=224, around=8, answer=8, num_sequences=16, tower_images=2)


def write_images(folder: Path, size: Size) -> list[str]:
    """The keys of pictures of noise, one a sequence, which lie in ``folder`` as canonical files."""
    keys = []
    for number in range(size.num_sequences):
        buffer = io.BytesIO()
        levels = np.random.default_rng(number).integers(0, 256, (size.side, size.side, 3), np.uint8)
        Image.fromarray(levels).save(buffer, "PNG", compress_level=1)
        keys.append(hashlib.sha256(buffer.getvalue()).hexdigest())
        file = image_file(folder, keys[-1])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(buffer.getvalue())
    return keys


def make_samples(vision: Vision, size: Size, keys: Sequence[str] | None) -> list[TrainSample]:
    """Sequences with an image each: sequence i has ``keys[i]``; without keys the same tokens, all of them text."""
    draw, grid = random.Random(5), size.grid(vision)
    count = num_image_tokens(grid, vision.merge)
    before = size.around // 2
    asked = count + size.around
    samples = []
    for index in range(size.num_sequences):
        text = [draw.randrange(vision.start_token) for _ in range(size.around - 2 + size.answer)]
        ids = [*text[: before - 1], vision.start_token, *[vision.image_token] * count, vision.end_token, *text[before - 1 :]]
        samples.append(
            train_sample(
                sample_id=index,
                group_id=index // GROUP,
                token_ids=ids,
                loss_mask=(0,) * asked + (1,) * size.answer,
                rollout_logprobs=(0.0,) * asked + (-12.0,) * size.answer,
                reward=float(index % 2),
                scalar_advantage=draw.uniform(-1, 1),
                images=() if keys is None else (ImageSpan(key=keys[index], start=before, grid=grid),),
            )
        )
    return samples
