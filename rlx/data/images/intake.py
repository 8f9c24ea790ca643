"""Images on their way in: decoded, made RGB, resized once to the model's grid, kept as lossless PNG by checksum.

From here on trainer and engine only normalise: neither resizes, so both have the same pixels to the bit. What is refused:
files that are missing, broken, cut off, animated, of four inks, far too large or too small; each ValueError says which.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import itertools
import json
import math
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from PIL import Image, ImageOps, UnidentifiedImageError

from rlx.arch.vision import Vision
from rlx.data.images.pixels import MEAN, STD, image_file
from rlx.types.rollout import ImageSpan

MOST_PIXELS = 64_000_000
LEAST_SIDE = 4
MOST_ASPECT = 200
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_HOLDERS = ("bytes", "path", "base64", "image", "url", "image_url")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """The sizes that a model takes: sides are multiples of ``side`` (a merged patch), the area is within the limits."""

    vision: Vision
    min_pixels: int
    max_pixels: int

    @property
    def side(self) -> int:
        return self.vision.patch * self.vision.merge

    def size_for(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to resize to: the nearest multiples, the aspect kept as well as those allow (Qwen2-VL's rule).

        A picture of 100 x 60 becomes 112 x 56 under a side of 28.
        """
        wide, high = (round(length / self.side) * self.side for length in (width, height))
        if wide * high > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            wide, high = (max(self.side, math.floor(length / shrink / self.side) * self.side) for length in (width, height))
        elif wide * high < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            wide, high = (math.ceil(length * grow / self.side) * self.side for length in (width, height))
        return wide, high

    def grid_of(self, width: int, height: int) -> tuple[int, int, int]:
        """The patches of an image of that final size."""
        return 1, height // self.vision.patch, width // self.vision.patch


def image_rules(model_path: str, vision: Vision, min_pixels: int | None, max_pixels: int | None) -> ImageRules:
    """The rules of the model in ``model_path``, by its image processor's file, narrowed by the two limits where they are given.

    Raises ValueError for a folder without that file, and for a processor that computes something else.
    """
    file, values = _processor(Path(model_path))
    wanted: dict[str, object] = {
        "patch_size": vision.patch,
        "merge_size": vision.merge,
        "temporal_patch_size": vision.temporal,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_normalize": True,
        "do_rescale": True,
    }
    for field, value in wanted.items():
        if values.get(field, value) != value:
            raise ValueError(f"{file}: {field} is {values[field]!r}; this family is trained with {value!r}")
    size = values.get("size")
    edges = size if isinstance(size, Mapping) else {}
    least = _pixels(file, "min_pixels", values.get("min_pixels", edges.get("shortest_edge", 56 * 56)))
    most = _pixels(file, "max_pixels", values.get("max_pixels", edges.get("longest_edge", 28 * 28 * 1280)))
    limits = (("min_pixels", min_pixels), ("max_pixels", max_pixels))
    least, most = least if min_pixels is None else min_pixels, most if max_pixels is None else max_pixels
    rules = ImageRules(vision=vision, min_pixels=least, max_pixels=most)
    area = rules.side**2
    if most // area < -(-least // area):
        own = [f"the model's own {key}" if given is None else f"data.{key}" for key, given in limits]
        raise ValueError(
            f"{own[0]} = {least} and {own[1]} = {most} ({file.name}) leave no size: areas are multiples of {area} pixels"
        )
    return rules


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """An image in its canonical form: ``key`` names the file, ``grid`` counts its patches."""

    key: str
    grid: tuple[int, int, int]

    def at(self, start: int) -> ImageSpan:
        """This image at a place among token ids."""
        return ImageSpan(key=self.key, start=start, grid=self.grid)


class ImageIntake:
    """Takes images in under ``rules`` and keeps them in ``folder``, each once.

    What was taken in before, by this process or another, is known again by the source's name, size and time (or its bytes)
    and not decoded. Without a folder nothing is written, and no key means anything: the first ``num_decoded`` images are decoded
    (None: all), of later ones only their heads are read.
    """

    def __init__(self, rules: ImageRules, folder: Path | None, num_decoded: int | None = None) -> None:
        self.rules, self._folder = rules, folder
        self._left: Iterator[int] = itertools.count() if num_decoded is None else iter(range(num_decoded))
        self._known: dict[str, StoredImage] = {}
        self._ledger = None if folder is None else folder / "known.jsonl"
        self._salt = f"{rules.min_pixels} {rules.max_pixels} {rules.side} {rules.vision.patch}"
        if self._ledger is not None and self._ledger.is_file():
            for line in self._ledger.read_text().splitlines():
                self._recall(line)

    def take(self, source: object, beside: Path) -> StoredImage:
        """The image that a row names: a path (relative ones start in ``beside``), bytes, base64 or a ``data:`` URL, or an object
        with one of these as ``bytes``, ``path``, ``image`` or ``url``."""
        name, data = _read(source, beside)
        source_id = hashlib.sha256(f"{self._salt} ".encode() + (name.encode() if isinstance(data, Path) else data)).hexdigest()
        known = self._known.get(source_id)
        if known is not None and (self._folder is None or image_file(self._folder, known.key).is_file()):
            return known
        found = self._take(name, data)
        self._known[source_id] = found
        if self._ledger is not None:
            self._ledger.parent.mkdir(parents=True, exist_ok=True)
            with self._ledger.open("a") as ledger:
                ledger.write(json.dumps({"source": source_id, "key": found.key, "grid": found.grid}) + "\n")
        return found

    def files(self, spans: tuple[ImageSpan, ...]) -> list[str]:
        """The canonical files of images."""
        return [] if self._folder is None else [str(image_file(self._folder, span.key)) for span in spans]

    def _recall(self, line: str) -> None:
        try:
            entry = json.loads(line)
            time, height, width = entry["grid"]
            self._known[entry["source"]] = StoredImage(key=entry["key"], grid=(time, height, width))
        except (ValueError, KeyError, TypeError):  # a line that a process did not finish: its image is taken in again
            return

    def _take(self, name: str, data: Path | bytes) -> StoredImage:
        shown = str(data) if isinstance(data, Path) else name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # limits of our own follow
                with Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=_FORMATS) as image:
                    return self._canonical(image)
        except UnidentifiedImageError:
            raise ValueError(f"image {shown}: no image of a known format ({', '.join(_FORMATS)})") from None
        except Image.DecompressionBombError:
            raise ValueError(f"image {shown}: more than {MOST_PIXELS:,} pixels") from None
        except (OSError, SyntaxError, EOFError, ValueError) as error:  # Pillow's plugins raise whatever a broken file makes them
            raise ValueError(f"image {shown}: {error}") from None

    def _canonical(self, image: Image.Image) -> StoredImage:
        self._check(image)
        turned = image.getexif().get(0x0112, 1) >= 5  # photographed on its side
        width, height = reversed(image.size) if turned else image.size
        size = self.rules.size_for(width, height)
        grid = self.rules.grid_of(*size)
        if self._folder is None:
            if next(self._left, None) is not None:
                image.load()
            return StoredImage(key="", grid=grid)
        upright = _rgb(ImageOps.exif_transpose(image))
        if upright.size != size:
            upright = upright.resize(size, Image.Resampling.BICUBIC)
        written = io.BytesIO()
        upright.save(written, "PNG")
        return StoredImage(key=_keep(written.getvalue(), self._folder), grid=grid)

    def _check(self, image: Image.Image) -> None:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels; at most {MOST_PIXELS:,} are read")
        if min(width, height) < LEAST_SIDE:
            raise ValueError(f"{width} x {height} pixels; each side has at least {LEAST_SIDE}")
        if max(width, height) > MOST_ASPECT * min(width, height):
            raise ValueError(f"{width} x {height} pixels; the long side is at most {MOST_ASPECT} times the short one")
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"{image.n_frames} frames; images that move are not supported")  # type: ignore[attr-defined]
        if image.mode not in _MODES:
            raise ValueError(f"its colours are {image.mode}; known are {', '.join(_MODES)} (convert it to RGB)")


def _processor(folder: Path) -> tuple[Path, Mapping[str, object]]:
    for name in _PROCESSOR_FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text())
            values = values["image_processor"] if name == _PROCESSOR_FILES[1] else values
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} says nothing of an image processor: {error!r}") from None
        if not isinstance(values, Mapping):
            raise ValueError(f"{file} holds no object")
        return file, values
    raise ValueError(f"model.path: {folder} has no {' or '.join(_PROCESSOR_FILES)}, which engines and rlx read images by")


def _pixels(file: Path, field: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{file}: {field} must be a number of pixels, got {value!r}")
    return value


def _read(source: object, beside: Path) -> tuple[str, Path | bytes]:
    """A name for errors, and a path or the image's bytes. The name of a path says size and time too, so that it names the
    content."""
    if isinstance(source, Mapping):
        inner = next((source[key] for key in _HOLDERS if source.get(key) is not None), None)
        if inner is None:
            raise ValueError(
                f"an image must be a path, bytes or base64, got an object with {', '.join(map(str, source)) or 'nothing'}"
            )
        return _read(inner, beside)
    if isinstance(source, bytes | bytearray):
        return f"of {len(source)} bytes", bytes(source)
    if not isinstance(source, str) or not source:
        raise ValueError(f"an image must be a path, bytes or base64, got {type(source).__name__} {source!r:.80}")
    if source.startswith("data:"):
        return _decoded("data: URL", source.partition(",")[2])
    if "://" in source[:12] and not source.startswith("file://"):
        raise ValueError(f"image {source:.200}: images are not downloaded; give a path, bytes or base64")
    path = beside / source.removeprefix("file://")
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        if len(source) > 64 and not source.endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")):
            return _decoded("in base64", source)
        raise ValueError(f"image {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"image {path}: a {'folder' if stat.S_ISDIR(found.st_mode) else 'pipe or device'}, no file")
    return f"{path} {found.st_size} {found.st_mtime_ns}", path


def _decoded(what: str, text: str) -> tuple[str, bytes]:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image {what}: neither a file nor base64 ({error}): {text[:60]!r}") from None
    return f"{what}, {len(data)} bytes", data


def _rgb(image: Image.Image) -> Image.Image:
    """In RGB; what is transparent lies on white."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _keep(data: bytes, folder: Path) -> str:
    """Write a canonical file, whole or not at all; its key."""
    key = hashlib.sha256(data).hexdigest()
    file = image_file(folder, key)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=file.parent, delete=False) as written:
            written.write(data)
        os.chmod(written.name, 0o644)
        os.replace(written.name, file)
    return key
