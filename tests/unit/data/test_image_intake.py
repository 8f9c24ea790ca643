"""Images on their way in: what is kept is what the model's own processor would make, what cannot be used is refused by name."""

from __future__ import annotations

import base64
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rlx.data.images.intake import ImageIntake, ImageRules, image_rules
from rlx.data.images.pixels import image_file, pixels
from tests.tower import tower


def rules(**limits: int) -> ImageRules:
    return ImageRules(vision=tower(), **{"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 40} | limits)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


@pytest.mark.parametrize("seed", range(3))
def test_sizes_are_those_of_the_models_own_processor(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        width = draw.randrange(4, 3000)
        height = draw.randrange(max(4, width // 150), min(4000, width * 150))
        limits = {"min_pixels": draw.randrange(784, 9000), "max_pixels": draw.randrange(9001, 3_000_000)}
        wanted = smart_resize(height, width, 28, **limits)
        assert rules(**limits).size_for(width, height) == wanted[::-1], (width, height, limits)


def test_an_image_is_kept_once_and_read_to_the_bit(tmp_path: Path) -> None:
    store = ImageIntake(rules(), tmp_path / "images")
    picture = noise(112, 84)
    found = store.take(encoded(picture), tmp_path)
    assert found.grid == (1, 6, 8)
    (tmp_path / "a.png").write_bytes(encoded(picture, optimize=True))
    assert store.take("a.png", tmp_path) == found == store.take({"bytes": None, "path": "a.png"}, tmp_path)
    assert store.take(base64.b64encode(encoded(picture)).decode(), tmp_path) == found
    assert store.take("data:image/png;base64," + base64.b64encode(encoded(picture)).decode(), tmp_path) == found
    assert len(list((tmp_path / "images").rglob("*.png"))) == 1
    with Image.open(image_file(tmp_path / "images", found.key)) as kept:
        assert np.array_equal(np.asarray(kept), np.asarray(picture))
    assert pixels(image_file(tmp_path / "images", found.key), found.at(3), tower()).shape == (48, 1176)
    assert store.files((found.at(3),)) == [str(image_file(tmp_path / "images", found.key))]


def test_another_process_knows_what_was_taken_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(100, 60)))
    found = ImageIntake(rules(), tmp_path / "images").take("a.png", tmp_path)
    with (tmp_path / "images" / "known.jsonl").open("a") as ledger:
        ledger.write('{"source": "cut o')
    again = ImageIntake(rules(), tmp_path / "images")
    with monkeypatch.context() as context:
        context.setattr(Image, "open", lambda *arguments, **options: pytest.fail("decoded again"))
        assert again.take("a.png", tmp_path) == found
    image_file(tmp_path / "images", found.key).unlink()
    assert again.take("a.png", tmp_path) == found
    assert image_file(tmp_path / "images", found.key).is_file()
    (tmp_path / "a.png").write_bytes(encoded(noise(100, 60, seed=1)))
    assert again.take("a.png", tmp_path).key != found.key
    larger = ImageIntake(rules(min_pixels=300 * 300), tmp_path / "images").take("a.png", tmp_path)
    assert larger.grid != found.grid


def test_colours_become_rgb(tmp_path: Path) -> None:
    store = ImageIntake(rules(), tmp_path)
    for mode in ("1", "L", "P", "RGBA"):
        found = store.take(encoded(noise(56, 56, mode)), tmp_path)
        with Image.open(image_file(tmp_path, found.key)) as kept:
            assert kept.mode == "RGB"
    clear = Image.new("RGBA", (56, 56), (255, 0, 0, 0))
    with Image.open(image_file(tmp_path, store.take(encoded(clear), tmp_path).key)) as kept:
        assert kept.getpixel((5, 5)) == (255, 255, 255)


def test_a_photograph_on_its_side_stands_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = ImageIntake(rules(), tmp_path).take(encoded(noise(140, 56), "JPEG", exif=exif), tmp_path)
    assert found.grid == ImageIntake(rules(), None).take(encoded(noise(140, 56), "JPEG", exif=exif), tmp_path).grid == (1, 10, 4)


def faults(folder: Path) -> dict[str, tuple[object, str]]:
    frames = [noise(60, 60, seed=seed) for seed in range(3)]
    (folder / "cut.png").write_bytes(encoded(noise(200, 200))[:5000])
    (folder / "cut.jpg").write_bytes(encoded(noise(200, 200), "JPEG")[:2000])
    (folder / "words.png").write_text("no picture at all")
    (folder / "folder.png").mkdir()
    (folder / "empty.png").write_bytes(b"")
    (folder / "a space.png").write_text("no picture")
    os.mkfifo(folder / "pipe.png")
    return {
        "missing": ("none.png", r"none\.png: No such file"),
        "truncated png": ("cut.png", r"cut\.png: .*truncated|cut\.png: .*(broken|EOF)"),
        "truncated jpeg": ("cut.jpg", r"cut\.jpg: .*truncated"),
        "text": ("words.png", r"words\.png: no image of a known format"),
        "empty": ("empty.png", r"empty\.png: no image of a known format"),
        "folder": ("folder.png", r"folder\.png: a folder"),
        "pipe": ("pipe.png", r"pipe\.png: a pipe or device, no file"),
        "space": ("a space.png", r"a space\.png: no image of a known format"),
        "one pixel": (encoded(noise(1, 1)), "1 x 1 pixels; each side has at least 4"),
        "strip": (encoded(noise(1000, 4)), "at most 200 times"),
        "hundred megapixels": (encoded(Image.new("1", (10_000, 10_000))), "100,000,000|10000 x 10000 pixels; at most 64,000,000"),
        "bomb": (encoded(Image.new("1", (20_000, 20_000))), "more than 64,000,000 pixels"),
        "four inks": (encoded(noise(60, 60, "CMYK"), "JPEG"), "its colours are CMYK"),
        "sixteen bits": (encoded(Image.new("I;16", (60, 60))), "its colours are I;16"),
        "animated": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "3 frames"),
        "no base64": ("x!" * 40, "neither a file nor base64|File name too long|No such file"),
        "web": ("https://example.org/a.png", "not downloaded"),
        "number": (7, "must be a path, bytes or base64, got int"),
        "object": ({"width": 3}, "got an object with width"),
        "null in path": ("a\0b.png", "null"),
    }


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    found = faults(tmp_path)
    for folder in (tmp_path / "kept", None):
        store = ImageIntake(rules(), folder)
        for name, (source, words) in found.items():
            with pytest.raises(ValueError, match=words):
                store.take(source, tmp_path)
                pytest.fail(name)


def test_a_look_decodes_the_first_images_and_reads_the_heads_of_others(tmp_path: Path) -> None:
    found = faults(tmp_path)
    store = ImageIntake(rules(), None, num_decoded=1)
    with pytest.raises(ValueError, match="truncated"):
        store.take(found["truncated jpeg"][0], tmp_path)
    assert store.take(found["truncated jpeg"][0], tmp_path).grid
    with pytest.raises(ValueError, match="CMYK"):
        store.take(found["four inks"][0], tmp_path)


def processor(folder: Path, **changes: object) -> str:
    values = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 50176} | changes
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return str(folder)


def test_rules_come_from_the_models_processor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json or processor_config\.json"):
        image_rules(str(tmp_path), tower(), None, None)
    edges = {"size": {"shortest_edge": 784, "longest_edge": 7840}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": edges}))
    assert image_rules(str(tmp_path), tower(), None, None).max_pixels == 7840
    assert image_rules(processor(tmp_path), tower(), None, None) == ImageRules(vision=tower(), min_pixels=3136, max_pixels=50176)
    assert image_rules(processor(tmp_path), tower(), 4000, 5000).min_pixels == 4000
    for changes, words in (
        ({"patch_size": 16}, "patch_size is 16; this family is trained with 14"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"min_pixels": True}, "min_pixels must be a number of pixels"),
        ({"max_pixels": "many"}, "max_pixels must be a number of pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            image_rules(processor(tmp_path, **changes), tower(), None, None)
    with pytest.raises(ValueError, match=r"data\.min_pixels = 9000 and data\.max_pixels = 50"):
        image_rules(processor(tmp_path), tower(), 9000, 50)
