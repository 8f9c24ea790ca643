"""A vision tower's description, for tests that build none."""

from __future__ import annotations

from rlx.arch.vision import Vision


def tower(image_token: int = 7, *, merge: int = 2, patch: int = 14, temporal: int = 2) -> Vision:
    """Small; the tokens of videos, beginnings and ends are the next three."""
    return Vision(
        depth=1,
        hidden_size=32,
        num_heads=4,
        mlp_size=48,
        activation="silu",
        patch=patch,
        temporal=temporal,
        merge=merge,
        image_token=image_token,
        video_token=image_token + 1,
        start_token=image_token + 2,
        end_token=image_token + 3,
    )
