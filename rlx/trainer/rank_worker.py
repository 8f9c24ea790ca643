"""What every trainer rank does, whatever it learns: hold a batch, score, keep. ``Worker`` and ``FinetuneWorker`` are such.

A worker knows nothing of where the driver lives; it is called with plain values and answers with plain values. All methods are
collective over the trainer ranks. Token columns never leave a worker. Numbers that only the last pipeline stage knows are
returned there and None elsewhere.
"""

from __future__ import annotations

from typing import Protocol

from rlx.trainer.rank_model import Means
from rlx.types.train_batch import BatchPart


class RankWorker(Protocol):
    """The methods that both kinds of workers have."""

    def load_batch(self, part: BatchPart) -> None:
        """Hold these samples, this rank's part of a batch, until the next ones."""

    def score_reference(self) -> Means | None:
        """The column ``ref_logprobs``."""

    def save(self, folder: str) -> None:
        """Write every trained model below ``folder``, which rank 0 makes."""

    def load(self, folder: str) -> None:
        """Restore what ``save`` wrote; of a model that is only read, its weights."""

    def export(self, folder: str) -> None:
        """Write the model that users want as a Hugging Face folder."""

    def close(self) -> None:
        """Leave what was joined beside the ranks' own groups."""
