"""A regular expression over the response."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rlx.rewards.base import label_of, verdict
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class RegexMatch:
    """1 when ``pattern`` is found and, if it has groups, its group equals the label (outer whitespace ignored).

    The group is the one named ``answer`` where there is one, else the first. ``which`` picks among several matches:
    ``first`` or ``last``. A pattern without groups only has to be found. Raises ValueError on a bad pattern or choice.
    """

    pattern: str
    which: str = "last"
    ignore_case: bool = False
    _compiled: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.which not in ("first", "last"):
            raise ValueError(f"reward.args.which must be first or last, got {self.which!r}")
        if not isinstance(self.pattern, str):
            raise ValueError(f"reward.args.pattern must be text, got {self.pattern!r}")
        try:
            compiled = re.compile(self.pattern, re.IGNORECASE if self.ignore_case else 0)
        except re.error as error:
            raise ValueError(f"reward.args.pattern {self.pattern!r} is not a regular expression: {error}") from error
        object.__setattr__(self, "_compiled", compiled)

    def __call__(self, request: RewardRequest) -> Reward:
        # A tag that the prompt's tail opened is part of the answer; a pattern may also be anchored at the response.
        matches = list(self._compiled.finditer(request.response)) or list(self._compiled.finditer(request.text))
        if not self._compiled.groups:
            return verdict(bool(matches))
        label = label_of(request.prompt).strip()
        if not matches:
            return verdict(False)
        match = matches[0 if self.which == "first" else -1]
        found = (match["answer" if "answer" in self._compiled.groupindex else 1] or "").strip()
        same = found.casefold() == label.casefold() if self.ignore_case else found == label
        return verdict(same)
