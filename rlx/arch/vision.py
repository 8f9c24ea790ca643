"""What the vision tower of a model computes. Knows no Megatron and no tensors."""

from __future__ import annotations

from dataclasses import dataclass

CHANNELS = 3
LEARNING = ("train", "projector", "frozen")
"""What of a tower can learn: all of it, what makes tokens of its patches, nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """A tower: blocks of attention over the patches of one image, then a projector that makes one token of ``merge`` x ``merge``
    patches.

    patch, temporal  a patch spans ``patch`` x ``patch`` pixels of ``temporal`` frames (a still image is repeated)
    window           pixels along the side of the windows that attention keeps to, but in the blocks ``full_blocks``; None: it
                     sees the whole image in every block
    mlp_size         hidden units of a block's MLP, which is gated where there are windows
    activation       transformers' name of it
    image_token      the placeholder; ``video_token`` is that of what is not supported, ``start_token`` and ``end_token`` frame
                     both
    """

    depth: int
    hidden_size: int
    num_heads: int
    mlp_size: int
    activation: str
    patch: int
    temporal: int
    merge: int
    image_token: int
    video_token: int
    start_token: int
    end_token: int
    window: int | None = None
    full_blocks: tuple[int, ...] = ()

    @property
    def patch_size(self) -> int:
        """Numbers of a patch."""
        return CHANNELS * self.temporal * self.patch**2

    @property
    def merged_size(self) -> int:
        """Numbers that the projector makes one token of."""
        return self.hidden_size * self.merge**2
