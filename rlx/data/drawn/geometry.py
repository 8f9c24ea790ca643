"""Comparing shapes: which is the largest, which lies furthest to one side, how many corners one has."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from rlx.config.options import option
from rlx.data.drawn.canvas import COLOURS, CORNERS, LEAST_CELL, Drawn, Shape, area_factor, draw_shapes, noisy

# Which way each asks for, along x and y.
_SIDES: Mapping[str, tuple[int, int]] = {"leftmost": (-1, 0), "rightmost": (1, 0), "topmost": (0, -1), "lowest": (0, 1)}
_WORDS = {"leftmost": "furthest to the left", "rightmost": "furthest to the right", "topmost": "highest up", "lowest": "lowest"}
_ASKS = ("largest", "corners", *_SIDES)
# Of the widest cell; a smaller shape is hard to tell from another.
_SMALLEST, _LARGEST = 0.45, 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Arguments of drawn:geometry."""

    pixels: int = option(224, "side of the picture", minimum=56, maximum=2048)
    min_shapes: int = option(2, "fewest shapes", minimum=2, maximum=len(COLOURS))
    max_shapes: int = option(5, "most shapes", minimum=2, maximum=len(COLOURS))
    margin: float = option(0.3, "by which the right shape is larger, or further, than the next", above=0, maximum=0.5)
    ask: str = option("any", "the question, or any", choices=("any", *_ASKS))
    noise: float = option(0.0, "parts of the picture that are noise", minimum=0, below=1)

    def __post_init__(self) -> None:
        if self.min_shapes > self.max_shapes:
            raise ValueError(f"min_shapes = {self.min_shapes} is above max_shapes = {self.max_shapes}")
        if self.pixels < self.max_shapes * LEAST_CELL:
            raise ValueError(
                f"max_shapes = {self.max_shapes} do not fit into pixels = {self.pixels}: at least {self.max_shapes * LEAST_CELL}"
            )

    def draw(self, draw: random.Random) -> Drawn:
        """A picture of shapes in colours of their own, and a question with one right answer."""
        ask = draw.choice(_ASKS) if self.ask == "any" else self.ask
        num = draw.randint(self.min_shapes, self.max_shapes)
        shapes = self._placed(num, draw)
        if ask == "corners":
            asked = draw.choice([shape for shape in shapes if CORNERS[shape.kind]])
            question = f"How many corners does the {asked.colour} shape have? Answer with the number alone."
            answer = str(CORNERS[asked.kind])
        elif ask == "largest":
            question = "What colour is the shape with the largest area? Answer with the colour alone."
            answer = max(shapes, key=lambda shape: shape.area).colour
        else:
            x, y = _SIDES[ask]
            question = f"What colour is the shape that lies {_WORDS[ask]}? Answer with the colour alone."
            answer = max(shapes, key=lambda shape: x * shape.middle[0] + y * shape.middle[1]).colour
        picture = noisy(draw_shapes(self.pixels, shapes, draw), self.noise, draw)
        return Drawn(picture=picture, question=question, answer=answer, facts={"num_shapes": num, "ask": ask})

    def _placed(self, num: int, draw: random.Random) -> list[Shape]:
        """Each in a row and a column that no other stands in, so that no two are level; the first is the largest."""
        cell = self.pixels / num
        # A circle would have no corners to ask about, so the first has some.
        kinds = [draw.choice([kind for kind in CORNERS if CORNERS[kind]]), *draw.choices([*CORNERS], k=num - 1)]
        colours = draw.sample([*COLOURS], num)
        columns, rows = (draw.sample(range(num), num) for _ in "xy")
        largest = cell / 2 * draw.uniform(0.8, _LARGEST)
        most = area_factor(kinds[0]) * largest**2 / (1 + self.margin)
        shapes = []
        for index, (kind, colour) in enumerate(zip(kinds, colours, strict=True)):
            radius = largest
            if index:
                ceiling = min(math.sqrt(most / area_factor(kind)), cell / 2 * _LARGEST)
                radius = draw.uniform(min(cell / 2 * _SMALLEST, ceiling), ceiling)
            free = min(cell / 2 - radius, cell / 2 * (1 - self.margin))
            x, y = ((at + 0.5) * cell + draw.uniform(-free, free) for at in (columns[index], rows[index]))
            shapes.append(Shape(kind=kind, colour=colour, middle=(x, y), radius=radius, turn=draw.uniform(0, 2 * math.pi)))
        return shapes
