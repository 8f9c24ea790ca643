"""What the maker of vision-language checkpoints and the ranks both know, free of transformers and of rlx."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE, IMAGE, VIDEO, START, END = 269, 262, 263, 264, 265
PATCH, MERGE = 14, 2
# Sides in merged patches, down and across: odd, a strip, one alone; windows of 4 by 4 tokens are cut at both edges.
GRIDS = {"wide": (5, 9), "strip": (1, 7), "square": (4, 4), "dot": (1, 1)}


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Token ids, of which those from ``asked`` on are learnt from; images by name and start."""

    token_ids: list[int]
    asked: int
    images: list[tuple[str, int]]


# Images, then lengths of the text around them and of the answer.
_SHAPES: list[tuple[tuple[str, ...], int, int]] = [
    (("wide",), 5, 9),
    ((), 13, 11),
    (("strip", "square"), 4, 6),
    (("wide",), 5, 1),
    (("dot", "wide"), 3, 17),
    ((), 2, 3),
    (("square",), 6, 12),
]


def grid_of(name: str) -> tuple[int, int, int]:
    """In patches."""
    height, width = GRIDS[name]
    return 1, height * MERGE, width * MERGE


def sequences() -> list[Sequence]:
    """None, one and two images a sequence, an image that several share, a sampled placeholder in an answer."""
    draw = random.Random(7)
    found = []
    for names, length, answer in _SHAPES:
        ids, images = [draw.randrange(IMAGE) for _ in range(length)], []
        for name in names:
            ids.append(START)
            images.append((name, len(ids)))
            ids += [IMAGE] * (GRIDS[name][0] * GRIDS[name][1])
            ids += [END, *(draw.randrange(IMAGE) for _ in range(length))]
        asked = len(ids)
        ids += [draw.randrange(VOCAB_SIZE) for _ in range(answer)]
        if answer > 4:
            ids[asked + 3] = IMAGE  # sampled: text, not an image
        found.append(Sequence(token_ids=ids, asked=asked, images=images))
    return found


def folder_of(root: Path, case: str, dtype: str) -> Path:
    return root / case.replace(" ", "-") / dtype
