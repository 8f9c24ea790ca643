"""The shape of a response, whatever its answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rlx.rewards.base import verdict
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Reward

THINK_ANSWER = r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatMatch:
    """1 when the whole response matches ``pattern`` (``.`` also matches line ends), by default one ``<think>`` block followed
    by one ``<answer>`` block. Raises ValueError on a bad pattern.

    After a prompt whose tail opens a tag (chat templates that end with ``<think>``), a response matches alone or behind that
    tag; one that repeats the tag must match with both.
    """

    pattern: str = THINK_ANSWER
    _compiled: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern, re.DOTALL)
        except (re.error, TypeError) as error:
            raise ValueError(f"reward.args.pattern {self.pattern!r} is not a regular expression: {error}") from error
        object.__setattr__(self, "_compiled", compiled)

    def __call__(self, request: RewardRequest) -> Reward:
        opening = request.opening.strip()
        is_repeated = bool(opening) and request.response.lstrip().startswith(opening)
        texts = {request.text} if is_repeated else {request.text, request.response}
        return verdict(any(self._compiled.fullmatch(text) for text in texts))
