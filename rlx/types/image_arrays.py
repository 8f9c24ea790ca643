"""The images of a batch as flat arrays. Knows no torch.

Shape legend: I places of images, K images that are different from each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rlx.types.rollout import ImageSpan

_KEY_BYTES = 32  # of a SHA-256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageArrays:
    """Which images stand where in the sequences of a ``TrainBatch``, sequence by sequence.

    sequences  int64 [I]; the sequence, by its place in the batch, in ascending order
    starts     int64 [I]; the first placeholder, counted in the sequence
    grids      int64 [I, 3]
    key_index  int64 [I]; the row of ``keys``
    keys       uint8 [K, 32]; every image that stands anywhere, once

    Two answers to a prompt with one image have sequences 0 1, key_index 0 0 and one key.
    """

    sequences: NDArray[np.int64]
    starts: NDArray[np.int64]
    grids: NDArray[np.int64]
    key_index: NDArray[np.int64]
    keys: NDArray[np.uint8]

    @classmethod
    def of(cls, spans: Sequence[Sequence[ImageSpan]]) -> Self | None:
        """The images of each sequence; None where none has any."""
        placed = [(sequence, span) for sequence, of_one in enumerate(spans) for span in of_one]
        if not placed:
            return None
        keys = {key: number for number, key in enumerate(dict.fromkeys(span.key for _, span in placed))}
        return cls(
            sequences=np.array([sequence for sequence, _ in placed], np.int64),
            starts=np.array([span.start for _, span in placed], np.int64),
            grids=np.array([span.grid for _, span in placed], np.int64),
            key_index=np.array([keys[span.key] for _, span in placed], np.int64),
            keys=np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, _KEY_BYTES),
        )

    def of_sequence(self, sequence: int) -> tuple[ImageSpan, ...]:
        """The images of one sequence, in order."""
        first, last = np.searchsorted(self.sequences, (sequence, sequence + 1)).tolist()
        return tuple(self._span(place) for place in range(first, last))

    def rows(self, indices: Sequence[int]) -> ImageArrays | None:
        """The images of these sequences, numbered anew in this order; None where they have none."""
        return ImageArrays.of([self.of_sequence(index) for index in indices])

    def _span(self, place: int) -> ImageSpan:
        time, height, width = self.grids[place].tolist()
        key = self.keys[self.key_index[place]].tobytes().hex()
        return ImageSpan(key=key, start=int(self.starts[place]), grid=(time, height, width))
