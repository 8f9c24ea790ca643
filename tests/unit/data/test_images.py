"""Images among tokens: positions and patches are those of transformers; files are named when they are not what they should be."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rlx.data.images.grid import num_image_tokens, pack_positions, place_images, positions
from rlx.data.images.pixels import image_file, image_folder, pixels
from rlx.types.rollout import ImageSpan
from tests.tower import tower


def theirs(length: int, spans: list[ImageSpan], merge: int) -> torch.Tensor:
    """transformers' positions, by its own function on a model that has nothing but a configuration."""
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge, tokens_per_second=4))
    whole: Any = Qwen2_5_VLModel
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = whole.get_vision_position_ids.__get__(model)
    kinds = torch.zeros(1, length, dtype=torch.int32)
    for span in spans:
        kinds[0, span.start : span.start + num_image_tokens(span.grid, merge)] = 1
    grids = torch.tensor([span.grid for span in spans]) if spans else None
    found, _ = whole.get_rope_index(model, torch.zeros(1, length, dtype=torch.int64), kinds, grids)
    of_one: torch.Tensor = found[:, 0]
    return of_one


def drawn(draw: random.Random, merge: int) -> tuple[int, list[ImageSpan]]:
    """A length and up to three images, at least a token apart, of odd grids too; the last may end the sequence."""
    spans: list[ImageSpan] = []
    at = 0
    for _ in range(draw.randrange(4)):
        start = at + draw.randrange(1, 6) if spans else draw.randrange(6)
        grid = (1, merge * draw.randrange(1, 8), merge * draw.randrange(1, 8))
        spans.append(ImageSpan(key="ab" * 32, start=start, grid=grid))
        at = start + num_image_tokens(grid, merge)
    return max(1, at + draw.randrange(6)), spans


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_positions_are_those_of_transformers(merge: int) -> None:
    draw = random.Random(merge)
    for _ in range(60):
        length, spans = drawn(draw, merge)
        assert np.array_equal(positions(length, spans, merge), theirs(length, spans, merge).numpy())


def test_positions_of_a_pack_are_those_of_its_sequences() -> None:
    draw = random.Random(5)
    sequences = [drawn(draw, 2) for _ in range(7)]
    borders = np.cumsum([0, *(length for length, _ in sequences)]).tolist()
    placed = [
        ImageSpan(key=span.key, start=start + span.start, grid=span.grid)
        for start, (_, spans) in zip(borders, sequences, strict=False)
        for span in spans
    ]
    alone = [positions(length, spans, 2) for length, spans in sequences]
    assert np.array_equal(pack_positions(borders, placed, 2), np.concatenate(alone, axis=1))


def test_the_first_placeholders_are_images() -> None:
    images = [("ab" * 32, (1, 2, 4)), ("cd" * 32, (1, 2, 2))]
    ids = [1, 7, 7, 7, 2, 7, 3]  # two images right behind each other, then a placeholder that is text
    spans = place_images(ids, images, tower())
    assert [(span.key, span.start) for span in spans] == [("ab" * 32, 1), ("cd" * 32, 3)]
    assert place_images(ids, [], tower()) == ()
    with pytest.raises(ValueError, match="image 2 is 2 tokens, but input_ids have 1 of 7"):
        place_images(ids, [images[0], images[0]], tower())
    with pytest.raises(ValueError, match="image 1 is 1 tokens, but input_ids have 0"):
        place_images([1, 2], images[1:], tower())


def stored(folder: Path, image: Image.Image, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, form)
    key = hashlib.sha256(buffer.getvalue()).hexdigest()
    file = image_file(folder, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(buffer.getvalue())
    return key


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("patch", "merge", "temporal"), [(14, 2, 2), (10, 1, 1), (6, 3, 2)])
def test_patches_are_those_of_transformers_to_the_bit(tmp_path: Path, patch: int, merge: int, temporal: int) -> None:
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=merge, temporal_patch_size=temporal, do_resize=False)
    folder, side = image_folder(tmp_path), patch * merge
    for height, width in ((1, 1), (3, 5), (4, 1)):
        image = noise(height * side, width * side)
        wanted = processor(images=[image], return_tensors="np")
        grid = (1, height * merge, width * merge)
        assert tuple(wanted["image_grid_thw"][0].tolist()) == grid
        span = ImageSpan(key=stored(folder, image), start=0, grid=grid)
        found = pixels(image_file(folder, span.key), span, tower(patch=patch, merge=merge, temporal=temporal))
        assert found.dtype == np.float32 and np.array_equal(found, wanted["pixel_values"])


def test_what_is_no_canonical_image_is_named(tmp_path: Path) -> None:
    def asked(key: str, grid: tuple[int, int, int] = (1, 2, 4)) -> None:
        pixels(image_file(tmp_path, key), ImageSpan(key=key, start=0, grid=grid), tower())

    good = stored(tmp_path, noise(28, 56))
    asked(good)
    with pytest.raises(ValueError, match=f"{good}.png has the grid \\(1, 2, 4\\).*\\(1, 4, 2\\)"):
        asked(good, (1, 4, 2))
    with pytest.raises(ValueError, match="42 x 42 pixels; both must be multiples of 28"):
        asked(stored(tmp_path, noise(42, 42)), (1, 3, 3))
    with pytest.raises(ValueError, match=f"{'ab' * 32}.png cannot be read"):
        asked("ab" * 32)
    with pytest.raises(ValueError, match="JPEG in RGB"):
        asked(stored(tmp_path, noise(28, 56), "JPEG"))
    with pytest.raises(ValueError, match="PNG in L"):
        asked(stored(tmp_path, noise(28, 56).convert("L")))
    cut = image_file(tmp_path, "cd" * 32)
    cut.parent.mkdir()
    cut.write_bytes(image_file(tmp_path, good).read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read"):
        asked("cd" * 32)
