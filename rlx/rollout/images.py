"""Images on their way to engines: whose tokens they are, and how a request names them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlx.arch.vision import Vision
from rlx.data.images.grid import num_image_tokens
from rlx.data.images.pixels import image_file
from rlx.rollout.sglang.image_request import write_entry
from rlx.types.rollout import ImageSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStore:
    """The folder of the images of a run, and the tower that they are for."""

    folder: Path
    vision: Vision


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedImages:
    """The images of one sequence of token ids; they stay where they are while tokens are added behind."""

    store: ImageStore
    spans: tuple[ImageSpan, ...]

    @property
    def places(self) -> frozenset[int]:
        """The tokens that stand for images."""
        merge = self.store.vision.merge
        return frozenset(at for span in self.spans for at in range(span.start, span.start + num_image_tokens(span.grid, merge)))

    def entries(self, *, as_data: bool) -> list[str]:
        """``image_data`` of a request: the files' paths, or their bytes for an engine that does not see the folder."""
        return [self._entry(span, as_data) for span in self.spans]

    def _entry(self, span: ImageSpan, as_data: bool) -> str:
        file = image_file(self.store.folder, span.key).absolute()
        if not as_data:
            return write_entry(span.key, span.start, span.grid, path=str(file))
        return write_entry(span.key, span.start, span.grid, data=base64.b64encode(file.read_bytes()).decode("ascii"))


def check_places(token_ids: Sequence[int], images: Sequence[ImageSpan], vision: Vision, what: str) -> None:
    """ValueError unless each image stands, in order, on a run of placeholders of its size."""
    end = 0
    for span in images:
        start, end_before = span.start, end
        end = start + num_image_tokens(span.grid, vision.merge)
        if start < end_before or list(token_ids[start:end]) != [vision.image_token] * (end - start):
            raise ValueError(f"{what}: tokens {start} to {end - 1} are not the placeholders of image {span.key}")
