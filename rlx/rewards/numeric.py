"""The last number of the response against the label."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rlx.rewards.base import label_of, verdict
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
# A sign that touches its number belongs to it unless something it could be subtracted from touches it on the other side:
# "is -5" but not "12-5". A sign with a space on its right is one only if no such thing stands before it: "= - 5" but not
# "12 - 5".
_TOUCHING = r"(?<![\w)\]])[+\-−]"
_SPACED = r"(?<![\w)\]])(?<![\w)\]]\s)[+\-−]\s"
_NUMBER = re.compile(rf"(?<![\w.])(?P<sign>{_SPACED}|{_TOUCHING})?\$?(?P<top>{_UNSIGNED})(?:\s?/\s?(?P<bottom>{_UNSIGNED}))?")


def last_number(text: str) -> float | None:
    """The last number written in ``text``: signs, decimals, 1,234 thousands, exponents and fractions 1/2; None if none.

    A fraction with denominator 0 counts as no number.
    """
    found = list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def _value(match: re.Match[str]) -> float | None:
    bottom = 1.0 if match["bottom"] is None else float(match["bottom"].replace(",", ""))
    if bottom == 0:
        return None
    sign = -1.0 if (match["sign"] or "+")[0] in "-−" else 1.0
    value = sign * float(match["top"].replace(",", "")) / bottom
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericMatch:
    """1 when the last number of the response is within ``tolerance`` (relative for labels beyond 1) of the label's.

    Raises ValueError for a negative tolerance at construction, and for a label that holds no number.
    """

    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"reward.args.tolerance must be at least 0, got {self.tolerance!r}")

    def __call__(self, request: RewardRequest) -> Reward:
        wanted = self._wanted(request.prompt)
        given = last_number(request.response)
        return verdict(given is not None and abs(given - wanted) <= self.tolerance * max(1.0, abs(wanted)))

    def check_prompt(self, prompt: Prompt) -> None:
        if prompt.label is not None:
            self._wanted(prompt)

    def _wanted(self, prompt: Prompt) -> float:
        label = label_of(prompt)
        wanted = last_number(label)
        if wanted is None:
            raise ValueError(f"the label {label!r:.200} of prompt {prompt.prompt_id} holds no number (reward.name: numeric)")
        return wanted
