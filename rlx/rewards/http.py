"""A remote scorer over HTTP, asked for many answers at once.

Request: ``{"items": [{"prompt": ..., "response": ..., "label": ..., "extra": {...}}, ...]}``; answer:
``{"scores": [number, ...]}`` in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlx.rewards.base import checked_reward
from rlx.rewards.remote import Batcher, Poster, RemoteError
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Reward


class HttpScorer:
    """Posts to ``url``; up to ``batch_size`` answers that come within ``max_wait_s`` share a request."""

    def __init__(self, *, url: str, batch_size: int = 32, max_wait_s: float = 0.02, **poster: Any) -> None:
        self._poster = Poster(url=url, **poster)
        self._batcher: Batcher[Mapping[str, object]] = Batcher(self._ask_all, batch_size, max_wait_s)

    def __call__(self, request: RewardRequest) -> Reward:
        prompt = request.prompt
        question = {"prompt": prompt.text, "response": request.response, "label": prompt.label, "extra": dict(prompt.extra)}
        return checked_reward(self._batcher.ask(question))

    def _ask_all(self, questions: Sequence[Mapping[str, object]]) -> Sequence[float]:
        answer = self._poster.post({"items": list(questions)})
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise RemoteError(f"the scorer answered {str(answer)[:200]!r}, expected an object with a list 'scores'")
        return scores
