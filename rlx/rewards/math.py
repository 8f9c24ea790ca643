"""Mathematical equality with the label, by math-verify (install rlx's extra ``math``).

math-verify takes milliseconds an answer. Three short cuts, each with the verdict that math-verify gives: a boxed answer
that is the label's text, two plain numbers (compared exactly), and a pair seen before (answers to one prompt repeat).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec

from rlx.rewards.base import label_of, verdict
from rlx.types import Completion, Prompt, Reward

if find_spec("math_verify") is not None:
    import math_verify

# Its own time limits use SIGALRM; the pool's are used instead, which it would warn about at every call.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_PLAIN = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?")
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
    """The exact value of an integer or decimal (1,234 thousands allowed), None for anything else."""
    return Fraction(text.replace(",", "")) if _PLAIN.fullmatch(text) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MathVerify:
    """1 when the response's final answer equals the label: in ``\\boxed{}``, or (``boxed_only`` false) found in the text.

    Labels are LaTeX or plain expressions, boxed or not. Raises ValueError at construction without math-verify.
    """

    boxed_only: bool = False

    def __post_init__(self) -> None:
        if find_spec("math_verify") is None:
            raise ValueError("reward.name: math needs the package math-verify (pip install 'rlx[math]')")

    def __call__(self, prompt: Prompt, response_text: str, completion: Completion) -> Reward:
        label = label_of(prompt)
        gold = (last_boxed(label) or label).strip().strip("$").strip()
        answer = last_boxed(response_text)
        if answer is None:
            return verdict(not self.boxed_only and _equal(gold, response_text))
        if answer == gold:
            return verdict(True)
        wanted, given = plain_number(gold), plain_number(answer)
        if wanted is not None and given is not None:
            return verdict(wanted == given)
        return verdict(_equal(gold, f"\\boxed{{{answer}}}"))


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
