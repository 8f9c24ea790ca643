"""Where images stand among tokens: how many tokens an image is, and the three positions of every token.

A token of text has one position, three times. An image's tokens stand at its place in time, down and across, counted from where
the text had come to; the text after it goes on behind the largest of them (Wang et al. 2024). Pure arithmetic, equal to
transformers' ``get_rope_index``. Legend: L tokens of a sequence, T of a pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from rlx.arch.vision import Vision
from rlx.types.rollout import ImageSpan
from rlx.types.train_batch import Ints


def num_image_tokens(grid: tuple[int, int, int], merge: int) -> int:
    """The placeholders of an image."""
    time, height, width = grid
    return time * (height // merge) * (width // merge)


def place_images(
    token_ids: Sequence[int], images: Sequence[tuple[str, tuple[int, int, int]]], vision: Vision
) -> tuple[ImageSpan, ...]:
    """The images, each a key and a grid, at the first placeholders of expanded ids; the placeholders after them are text.
    ValueError where one of them has no run of its own length."""
    spans, at = [], 0
    for number, (key, grid) in enumerate(images, start=1):
        count = num_image_tokens(grid, vision.merge)
        start = next((i for i in range(at, len(token_ids)) if token_ids[i] == vision.image_token), len(token_ids))
        at = start + count
        run = sum(1 for token in token_ids[start:at] if token == vision.image_token)
        if run < count:
            raise ValueError(f"image {number} is {count} tokens, but input_ids have {run} of {vision.image_token} in its place")
        spans.append(ImageSpan(key=key, start=start, grid=grid))
    return tuple(spans)


def positions(length: int, spans: Iterable[ImageSpan], merge: int) -> Ints:
    """Positions along time, height and width of every token of a sequence, [3, L]. ``spans`` are in order and do not overlap."""
    found = np.empty((3, length), np.int64)
    at, following = 0, 0  # the next token, and its position
    for span in spans:
        found[:, at : span.start] = np.arange(span.start - at) + following
        following += span.start - at
        time, height, width = span.grid[0], span.grid[1] // merge, span.grid[2] // merge
        at = span.start + num_image_tokens(span.grid, merge)
        found[:, span.start : at] = np.indices((time, height, width)).reshape(3, -1) + following
        following += max(height, width)
    found[:, at:] = np.arange(length - at) + following
    return found


def pack_positions(borders: Sequence[int], spans: Sequence[ImageSpan], merge: int) -> Ints:
    """The same of a pack, [3, T]: sequence i has the tokens ``borders[i]`` to ``borders[i + 1]`` - 1, and the starts of ``spans``
    count in the pack."""
    parts = []
    for start, end in pairwise(borders):
        mine = (replace(span, start=span.start - start) for span in spans if start <= span.start < end)
        parts.append(positions(end - start, mine, merge))
    return np.concatenate(parts, axis=1)
