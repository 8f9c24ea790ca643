"""Reading a number: its size, place, tilt, colours and noise are random."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from rlx.config.options import option
from rlx.data.drawn.canvas import Colour, Drawn, contrasting, noisy

QUESTION = "What number is in the picture? Answer with the number alone."
_CONTRAST = 100  # grey levels between ground and digits: below some 40 they are hard to see


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """Arguments of drawn:number."""

    pixels: int = option(112, "side of the picture", minimum=28, maximum=2048)
    min_digits: int = option(1, "digits of the shortest number", minimum=1, maximum=8)
    max_digits: int = option(3, "digits of the longest number", minimum=1, maximum=8)
    min_height: float = option(0.3, "height of the smallest digits, in parts of the side", above=0, maximum=1)
    max_height: float = option(0.6, "height of the largest digits", above=0, maximum=1)
    spread: float = option(1.0, "how far from the middle it may lie, in parts of the way to the edge", minimum=0, maximum=1)
    tilt: float = option(0.0, "degrees that the number may be turned by, either way", minimum=0, maximum=90)
    noise: float = option(0.1, "parts of the picture that are noise", minimum=0, below=1)

    def __post_init__(self) -> None:
        if self.min_digits > self.max_digits:
            raise ValueError(f"min_digits = {self.min_digits} is above max_digits = {self.max_digits}")
        if self.min_height > self.max_height:
            raise ValueError(f"min_height = {self.min_height:g} is above max_height = {self.max_height:g}")

    def draw(self, draw: random.Random) -> Drawn:
        """A picture of a number of some digits, each length as likely as another."""
        digits = draw.randint(self.min_digits, self.max_digits)
        text = str(draw.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
        ground, ink = contrasting(draw, _CONTRAST)
        picture = Image.new("RGB", (self.pixels, self.pixels), ground)
        stamp = self._stamp(text, draw)
        left, top = (round((self.pixels - length) / 2 * (1 + self.spread * draw.uniform(-1, 1))) for length in stamp.size)
        picture.paste(Image.new("RGB", stamp.size, ink), (left, top), stamp)
        return Drawn(picture=noisy(picture, self.noise, draw), question=QUESTION, answer=text, facts={"num_digits": digits})

    def blank(self, draw: random.Random) -> Image.Image:
        """Ground and noise as in the other pictures, without a number."""
        ground: Colour = contrasting(draw, _CONTRAST)[0]
        return noisy(Image.new("RGB", (self.pixels, self.pixels), ground), self.noise, draw)

    def _stamp(self, text: str, draw: random.Random) -> Image.Image:
        """The digits as a mask that fits into the picture."""
        height = round(self.pixels * draw.uniform(self.min_height, self.max_height))
        turned = draw.uniform(-self.tilt, self.tilt)
        left, top, right, bottom = (round(edge) for edge in _font(max(height, 4)).getbbox(text))
        mask = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=_font(max(height, 4)))
        mask = mask.rotate(turned, Image.Resampling.BICUBIC, expand=True) if turned else mask
        mask.thumbnail((self.pixels, self.pixels))
        return mask


@lru_cache(maxsize=256)
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings, its digits about that many pixels high."""
    return ImageFont.load_default(height * _HEIGHT_TO_SIZE)


_HEIGHT_TO_SIZE = 1.4  # a digit is about 0.7 of a font's size high
