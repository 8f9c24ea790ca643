"""Mathematical equality with the label, by math-verify (install rlx's extra ``math``).

math-verify takes milliseconds an answer. Three short cuts, each with the verdict that math-verify gives: a boxed answer
that is the label's text, two plain numbers or fractions, and a pair seen before (answers to one prompt repeat).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec

from rlx.rewards.base import label_of, verdict
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward

if find_spec("math_verify") is not None:
    import math_verify

# Its own time limits use SIGALRM; the pool's are used instead, which it would warn about at every call.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# math-verify reads a sign before thousands, a sign with a space and more digits than a float holds in ways of its own.
_DECIMAL = re.compile(r"[-+]?\d{1,9}(?:\.\d{1,5})?|\d{1,3}(?:,\d{3}){1,2}")
_FRACTION = re.compile(
    r"(?P<sign>[-+]?)(?:\\[dt]?frac\{(?P<top>-?\d{1,9})\}\{(?P<bottom>\d{1,6})\}|(?P<a>\d{1,9})/(?P<b>\d{1,6}))"
)
# It rounds to 6 decimals where a decimal fraction takes part; numbers as far apart as this are surely different then.
_ROUNDING = Fraction(2, 10**6)
_CONSTRUCTS = (
    r"\frac{3x}{7}",
    r"\sqrt{8}",
    r"x^2+2x+1",
    r"(1,2)",
    r"\{1,2\}",
    r"\frac{\sqrt[3]{3}}{7}",
    r"2\pi",
    r"\text{even}",
    r"(-\infty, 3]",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"x=3",
    r"50\%",
    r"90^\circ",
    r"3.5",
    r"\sin x",
)
_BOXED = re.compile(r"\\boxed\s*\{")


def last_boxed(text: str) -> str | None:
    r"""What the last whole ``\boxed{...}`` of ``text`` holds, braces balanced; None without one."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for index in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if not depth:
                return text[match.end() : index].strip()
    return None


def plain_number(text: str) -> Fraction | None:
    """The exact value of a short integer, decimal (1,234 thousands allowed) or fraction (``\\frac{1}{2}``, ``1/2``); None for
    anything else."""
    if _DECIMAL.fullmatch(text):
        return Fraction(text.replace(",", ""))
    found = _FRACTION.fullmatch(text)
    top, bottom = (int(found["top"] or found["a"]), int(found["bottom"] or found["b"])) if found else (0, 0)
    return None if found is None or bottom == 0 else (-1 if found["sign"] == "-" else 1) * Fraction(top, bottom)


def same_number(gold: str, answer: str) -> bool | None:
    """Whether two plain numbers are one as math-verify sees it; None for it to say."""
    wanted, given = plain_number(gold), plain_number(answer)
    if wanted is None or given is None:
        return None
    if wanted == given or abs(wanted - given) >= _ROUNDING:
        return wanted == given
    return None if "." in gold + answer else False


@dataclass(frozen=True, slots=True, kw_only=True)
class MathVerify:
    """1 when the response's final answer equals the label: in ``\\boxed{}``, or (``boxed_only`` false) found in the text.

    Labels are LaTeX or plain expressions, boxed or not. Raises ValueError at construction without math-verify.
    """

    boxed_only: bool = False

    def __post_init__(self) -> None:
        if find_spec("math_verify") is None:
            raise ValueError("reward.name: math needs the package math-verify (pip install 'rlx[math]')")

    def __call__(self, request: RewardRequest) -> Reward:
        gold = _gold_of(request.prompt)
        answer = last_boxed(request.response)
        if answer is None:
            return verdict(not self.boxed_only and _equal(gold, request.response))
        if answer == gold:
            return verdict(True)
        same = same_number(gold, answer)
        if same is not None:
            return verdict(same)
        return verdict(_equal(gold, f"\\boxed{{{answer}}}"))

    def check_prompt(self, prompt: Prompt) -> None:
        """Only that there is something: reading the labels of a whole file would take minutes."""
        if prompt.label is not None:
            _gold_of(prompt)

    def warm_up(self) -> None:
        """Parsers build their tables as they meet new constructs, half a second in all."""
        for expression in _CONSTRUCTS:
            _equal(expression, f"\\boxed{{{expression}+0}}")


def _gold_of(prompt: Prompt) -> str:
    label = label_of(prompt)
    boxed = last_boxed(label)
    gold = (label if boxed is None else boxed).strip().strip("$").strip()
    if not gold:
        raise ValueError(f"the label {label!r} of prompt {prompt.prompt_id} holds no expression (reward.name: math)")
    return gold


@lru_cache(maxsize=65536)
def _equal(gold: str, text: str) -> bool:
    found = math_verify.parse(text, parsing_timeout=None)
    return bool(found and math_verify.verify(_parsed_gold(gold), found, timeout_seconds=None))


@lru_cache(maxsize=4096)
def _parsed_gold(gold: str) -> list[object]:
    parsed = math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not parsed:
        raise ValueError(f"the label {gold!r} is no mathematical expression that math-verify can read")
    return list(parsed)
