"""What the checkpoints' maker and the ranks both know, free of transformers and of rlx."""

from __future__ import annotations

import random
from pathlib import Path

VOCAB_SIZE = 131
# On both sides of every border: a window of six tokens, and the length where LongRoPE's long factors begin.
ORIGINAL_POSITIONS = 22
LENGTHS = (30, 22, 23, 1, 7, 13, 2, 41)


def sequences() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def folder_of(root: Path, case: str, dtype: str) -> Path:
    return root / case.replace(" ", "-") / dtype
