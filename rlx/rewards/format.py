"""The shape of a response, whatever its answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rlx.rewards.base import verdict
from rlx.types.rollout import Completion, Prompt, Reward

THINK_ANSWER = r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatMatch:
    """1 when the whole response matches ``pattern`` (``.`` also matches line ends), by default one ``<think>`` block followed
    by one ``<answer>`` block. Raises ValueError on a bad pattern."""

    pattern: str = THINK_ANSWER
    _compiled: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern, re.DOTALL)
        except (re.error, TypeError) as error:
            raise ValueError(f"reward.args.pattern {self.pattern!r} is not a regular expression: {error}") from error
        object.__setattr__(self, "_compiled", compiled)

    def __call__(self, prompt: Prompt, response_text: str, completion: Completion) -> Reward:
        return verdict(self._compiled.fullmatch(response_text) is not None)
