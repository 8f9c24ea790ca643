"""The form of images that runs in engines: pixels and positions are transformers', and what does not fit is said."""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlx.data.images.grid import positions as grid_positions
from rlx.data.images.pixels import image_file
from rlx.data.images.pixels import pixels as trainer_pixels
from rlx.rollout.sglang import image_request
from rlx.rollout.sglang.image_request import Patches, content, is_ours, pixels, positions, read_entries, write_entry
from rlx.rollout.sglang.server import IMAGES_PACKAGE, write_modules
from tests.models_vision import (
    END,
    IMAGE,
    MEAN,
    MERGE,
    PATCH,
    START,
    STD,
    TEMPORAL,
    Picture,
    expand,
    make,
    patches,
    vision_of,
    write_picture,
)

PATCHES = Patches(size=PATCH, merge=MERGE, frames=TEMPORAL, mean=MEAN, std=STD)
IDS = [1, START, IMAGE, IMAGE, END, 2]
KEY = "cd" * 32


def entry(**more: Any) -> str:
    fields = {"form": 1, "key": KEY, "start": 2, "grid": [1, 2, 4], "path": "/x.png", **more}
    return "rlx_images:" + json.dumps({name: value for name, value in fields.items() if value is not ...})


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (1, 1), (1, 7), (4, 3)])
def test_pixels_are_those_of_transformers_and_of_the_trainers(tmp_path: Path, rows: int, columns: int) -> None:
    picture = write_picture(tmp_path, rows, rows, columns)
    ids, (span,) = expand([[1], picture])
    text = write_entry(span.key, span.start, span.grid, path=str(image_file(tmp_path, span.key)))
    [read] = read_entries([text], ids, IMAGE, MERGE)
    found = pixels(content(read), read, PATCHES)
    assert found.dtype == torch.float32 and torch.equal(found, patches(image_file(tmp_path, span.key)))
    np.testing.assert_array_equal(found.numpy(), trainer_pixels(image_file(tmp_path, span.key), span, vision_of(make())))
    data = base64.b64encode(image_file(tmp_path, span.key).read_bytes()).decode()
    [sent] = read_entries([write_entry(span.key, span.start, span.grid, data=data)], ids, IMAGE, MERGE)
    assert content(sent) == content(read) and (sent.start, sent.end) == (2, 2 + rows * columns)


def test_positions_are_those_of_the_trainers() -> None:
    """Which their own tests compare with transformers'."""
    ids, spans = expand(
        [[5] * 4, Picture(KEY, (1, 10, 16)), [6, IMAGE], Picture(KEY, (1, 2, 2)), Picture(KEY, (1, 2, 14)), [7] * 9]
    )
    found = positions(len(ids), [(span.start, span.grid) for span in spans], MERGE)
    np.testing.assert_array_equal(found.numpy(), grid_positions(len(ids), spans, MERGE))
    assert positions(3, [], MERGE).tolist() == [[0, 1, 2]] * 3


def test_ids_that_no_span_names_are_text() -> None:
    assert read_entries([entry()], [*IDS, IMAGE, IMAGE], IMAGE, MERGE)[0].end == 4
    assert is_ours([entry()]) and is_ours(["iVBOR", entry()])
    assert not any(map(is_ours, (None, [], "rlx_images:{}", ["iVBOR"], [{"url": "rlx_images:"}], [["rlx_images:"]])))


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([entry(form=0)], r"image_data\[0\] is of form 0; this engine knows form 1"),
        ([image_request.PROBE], image_request.KNOWS_FORM),
        (["rlx_images:[1]"], "form None"),
        (["rlx_images:{"], "not JSON"),
        ([entry(), "iVBOR"], r"image_data\[1\] is 'iVBOR'; wanted a text that begins with 'rlx_images:'"),
        ([entry(), entry()], r"image_data\[1\] begins at token 2, inside the image before it"),
        ([entry(), entry(start=4)], r"image_data\[1\]: input_ids\[4:6\] of 6 are not all image placeholders \(262\)"),
        ([entry(start=3)], r"input_ids\[3:5\] of 6"),
        ([entry(start=5)], r"input_ids\[5:7\] of 6"),
        ([entry(grid=[1, 2, 6])], r"input_ids\[2:5\] of 6"),
        ([entry(grid=[1, 3, 4])], r"grid is \[1, 3, 4\]; wanted \[1, h, w\] with h and w multiples of 2"),
        ([entry(grid=[2, 2, 2])], r"grid is \[2, 2, 2\]"),
        ([entry(grid=[1, 2, 0])], "grid is .* wanted the numbers of its patches"),
        ([entry(grid="1")], "grid is '1'"),
        ([entry(start=-1)], "start is '-1'"),
        ([entry(start=...)], "start is 'None'"),
        ([entry(key="ab")], "key is 'ab'"),
        ([entry(path=...)], "wanted exactly one of path and data"),
        ([entry(data="")], "wanted exactly one of path and data"),
        ([entry(path=3)], "wanted exactly one of path and data, as a text"),
    ],
)
def test_what_does_not_fit_the_ids_is_said(texts: list[object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_entries(texts, IDS, IMAGE, MERGE)


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    written = io.BytesIO()
    Image.new(mode, (width, height)).save(written, format="png")
    return written.getvalue()


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (png(28, 56), "it has 28 x 56 pixels, which the grid .* does not fit: with patches of 14 it stands for 56 x 28"),
        (png(57, 28), "it has 57 x 28 pixels"),
        (png(56, 28)[:-30], "cannot be used"),
        (b"GIF", "cannot be used"),
    ],
)
def test_a_file_of_another_size_or_none_is_said(file: bytes, says: str) -> None:
    key = sha256(file).hexdigest()
    [read] = read_entries([entry(key=key, path=..., data=base64.b64encode(file).decode())], IDS, IMAGE, MERGE)
    with pytest.raises(ValueError, match=says):
        pixels(content(read), read, PATCHES)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"path": "/nowhere.png"}, f"{image_request.NO_SUCH_FILE} {KEY}: '/nowhere.png'"),
        ({"path": __file__}, f"{image_request.NO_SUCH_FILE}.* are not those of the key"),
        ({"path": "a\0b"}, image_request.NO_SUCH_FILE),
        ({"path": ..., "data": "@@@"}, "no base64"),
        ({"path": ..., "data": "aaaa"}, "rlx_images: the bytes sent of 3 bytes are not those of the key"),
    ],
)
def test_content_is_that_of_the_key(source: dict[str, Any], says: str) -> None:
    [read] = read_entries([entry(**source)], IDS, IMAGE, MERGE)
    with pytest.raises(ValueError, match=says):
        content(read)


def test_the_package_needs_nothing_of_rlx(tmp_path: Path) -> None:
    write_modules(tmp_path, "cpu")
    files = sorted(path.name for path in (tmp_path / IMAGES_PACKAGE).iterdir())
    assert files == ["__init__.py", "image_processor.py", "image_request.py"]
    allowed = {"numpy", "torch", "PIL", "sglang", *sys.stdlib_module_names}
    for name in files:
        tree = ast.parse((tmp_path / IMAGES_PACKAGE / name).read_text())
        imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 or f"{node.module}.py" in files
                imported |= set() if node.level else {str(node.module).split(".")[0]}
        assert imported <= allowed
