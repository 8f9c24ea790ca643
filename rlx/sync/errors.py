"""How a weight sync fails."""

from __future__ import annotations


class SyncError(RuntimeError):
    """A publication failed; the engines stay paused. Names the side, stage, phase and the tensor or engine."""


class CanaryError(SyncError):
    """Every engine took the weights, yet one scores the canary prompts unlike the trainer."""
