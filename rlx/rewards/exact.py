"""Exact match with the label."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from rlx.rewards.base import label_of, verdict
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMatch:
    """1 when the response equals the label. ``strip``: outer whitespace is ignored; ``ignore_case``; ``normalize``: Unicode
    is brought to NFKC and runs of whitespace count as one space."""

    strip: bool = True
    ignore_case: bool = False
    normalize: bool = False

    def __call__(self, request: RewardRequest) -> Reward:
        return verdict(self._canonical(request.response) == self._canonical(label_of(request.prompt)))

    def _canonical(self, text: str) -> str:
        if self.normalize:
            text = " ".join(unicodedata.normalize("NFKC", text).split(" " if not self.strip else None))
        if self.strip:
            text = text.strip()
        return text.casefold() if self.ignore_case else text
