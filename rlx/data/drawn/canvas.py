"""What the drawn tasks share: a picture with its question, shapes, colours, noise. Pillow alone; every draw comes from one
``random.Random``."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: Mapping[str, Colour] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
    "purple": (140, 70, 190),
    "orange": (255, 127, 14),
    "pink": (240, 130, 190),
    "brown": (120, 70, 40),
}
# Of a shape with 0 corners every point is as far from its middle.
CORNERS: Mapping[str, int] = {"circle": 0, "triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
LEAST_CELL = 16
"""Pixels along the side of the square that a shape stands in: in fewer a pentagon is no pentagon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A picture, what is asked about it, the answer, and numbers that say how hard it is."""

    picture: Image.Image
    question: str
    answer: str
    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A shape by the names of its kind and colour; ``radius`` is from its middle to its corners, ``turn`` in radians."""

    kind: str
    colour: str
    middle: Point
    radius: float
    turn: float

    @property
    def area(self) -> float:
        return area_factor(self.kind) * self.radius**2


def area_factor(kind: str) -> float:
    """The area of a shape of radius 1."""
    corners = CORNERS[kind]
    return corners / 2 * math.sin(2 * math.pi / corners) if corners else math.pi


def draw_shapes(pixels: int, shapes: list[Shape], draw: random.Random) -> Image.Image:
    """A square picture of shapes on a light ground."""
    ground = draw.randrange(225, 256)
    picture = Image.new("RGB", (pixels, pixels), (ground, ground, ground))
    canvas = ImageDraw.Draw(picture)
    for shape in shapes:
        (x, y), radius, corners = shape.middle, shape.radius, CORNERS[shape.kind]
        fill = COLOURS[shape.colour]
        if not corners:
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            continue
        angles = [shape.turn + 2 * math.pi * corner / corners for corner in range(corners)]
        canvas.polygon([(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles], fill=fill)
    return picture


def contrasting(draw: random.Random, least: float) -> tuple[Colour, Colour]:
    """Two colours whose brightness differs by at least that many of 255 grey levels."""
    while True:
        first, second = _colour(draw), _colour(draw)
        if abs(brightness(first) - brightness(second)) >= least:
            return first, second


def brightness(colour: Colour) -> float:
    """How bright a colour looks, 0 to 255."""
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue


def noisy(picture: Image.Image, noise: float, draw: random.Random) -> Image.Image:
    """The picture, ``noise`` parts of it replaced by random grey levels: 0 leaves it as it is, 1 leaves nothing of it."""
    if not noise:
        return picture
    width, height = picture.size
    return Image.blend(picture, Image.frombytes("RGB", picture.size, draw.randbytes(3 * width * height)), noise)


def png(picture: Image.Image) -> bytes:
    """The picture's file."""
    written = io.BytesIO()
    picture.save(written, "PNG", compress_level=1)
    return written.getvalue()


def _colour(draw: random.Random) -> Colour:
    return draw.randrange(256), draw.randrange(256), draw.randrange(256)
