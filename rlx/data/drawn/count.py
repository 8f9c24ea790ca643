"""Counting the shapes of one kind and colour among others."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from rlx.config.options import option
from rlx.data.drawn.canvas import COLOURS, CORNERS, LEAST_CELL, Drawn, Shape, draw_shapes, noisy


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Arguments of drawn:count."""

    pixels: int = option(224, "side of the picture", minimum=56, maximum=2048)
    min_shapes: int = option(0, "fewest shapes to count", minimum=0, maximum=1000)
    max_shapes: int = option(8, "most shapes to count", minimum=1, maximum=1000)
    max_others: int = option(6, "most shapes of another kind or colour", minimum=0, maximum=1000)
    noise: float = option(0.0, "parts of the picture that are noise", minimum=0, below=1)

    def __post_init__(self) -> None:
        if self.min_shapes > self.max_shapes:
            raise ValueError(f"min_shapes = {self.min_shapes} is above max_shapes = {self.max_shapes}")
        most, room = self.max_shapes + self.max_others, (self.pixels // LEAST_CELL) ** 2
        if most > room:
            raise ValueError(
                f"max_shapes + max_others = {most} do not fit into pixels = {self.pixels}, which have room for {room} shapes"
            )

    def draw(self, draw: random.Random) -> Drawn:
        """A picture with so many shapes of the kind asked for, and others; none overlap."""
        kinds = [(kind, colour) for kind in CORNERS for colour in COLOURS]
        asked = draw.choice(kinds)
        others = [other for other in kinds if other != asked and (other[0] == asked[0] or other[1] == asked[1])]
        num = draw.randint(self.min_shapes, self.max_shapes)
        num_others = draw.randint(0, self.max_others)
        looks = [asked] * num + [draw.choice(others) for _ in range(num_others)]
        shapes = self._placed(looks, draw)
        return Drawn(
            picture=noisy(draw_shapes(self.pixels, shapes, draw), self.noise, draw),
            question=f"How many {asked[1]} {asked[0]}s are in the picture? Answer with the number alone.",
            answer=str(num),
            facts={"num_shapes": num, "num_others": num_others},
        )

    def _placed(self, looks: list[tuple[str, str]], draw: random.Random) -> list[Shape]:
        """Each in a cell of its own, anywhere within it."""
        across = max(3, math.ceil(math.sqrt(len(looks))))
        cell = self.pixels / across
        shapes = []
        for number, (kind, colour) in zip(draw.sample(range(across**2), len(looks)), looks, strict=True):
            radius = cell / 2 * draw.uniform(0.5, 0.9)
            free = cell / 2 - radius
            x, y = ((at + 0.5) * cell + draw.uniform(-free, free) for at in (number % across, number // across))
            shapes.append(Shape(kind=kind, colour=colour, middle=(x, y), radius=radius, turn=draw.uniform(0, 2 * math.pi)))
        return shapes
