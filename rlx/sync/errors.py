"""How a weight sync fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class SyncError(RuntimeError):
    """A publication failed; the engines stay paused. Names the side, stage, phase and the tensor or engine.

    ``engines`` are the urls of those that died, hang or answer nonsense: the ones to replace before another attempt.
    """

    def __init__(self, message: str, engines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.engines = tuple(engines)


class CanaryError(SyncError):
    """Every engine took the weights, yet one scores the canary prompts unlike the trainer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncFailure:
    """A SyncError as a value, the same on every trainer rank: another attempt may follow."""

    message: str
    engines: tuple[str, ...]
