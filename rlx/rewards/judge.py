"""A language model as judge, behind an OpenAI-compatible ``/chat/completions``."""

from __future__ import annotations

import re
from typing import Any

from rlx.rewards.base import checked_reward, invalid, label_of
from rlx.rewards.remote import Poster, RemoteError
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Reward

TEMPLATE = """Grade the answer to the question on a scale from 0 (wrong) to 10 (perfect).

Question:
{prompt}

Reference answer:
{label}

Answer:
{response}

Explain briefly, then end with a line "Score: N"."""


class JudgeModel:
    """Asks ``model`` at ``url`` and divides the last match of ``pattern`` by ``scale``.

    ``template`` has the fields prompt, response and label (empty without one). A reply without a score, or with one outside
    0 to ``scale``, is an invalid verdict.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        template: str = TEMPLATE,
        pattern: str = r"Score:\s*(-?\d+(?:\.\d+)?)",
        scale: float = 10.0,
        **rest: Any,
    ) -> None:
        request_keys = ("temperature", "max_tokens")
        self._request = {"model": model, "temperature": 0.0, "max_tokens": 512}
        self._request |= {key: rest.pop(key) for key in request_keys if key in rest}
        self._poster = Poster(url=url if url.endswith("/chat/completions") else url.rstrip("/") + "/chat/completions", **rest)
        self._template, self._scale = template, scale
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"reward.args.pattern {pattern!r} is not a regular expression: {error}") from error
        if self._pattern.groups > 1:
            raise ValueError(f"reward.args.pattern {pattern!r} has {self._pattern.groups} groups; the score is one")
        self._fill("", "", "")

    def __call__(self, request: RewardRequest) -> Reward:
        prompt = request.prompt
        content = self._fill(prompt.text, request.response, "" if prompt.label is None else label_of(prompt))
        reply = self._text_of(self._poster.post({**self._request, "messages": [{"role": "user", "content": content}]}))
        found = self._pattern.findall(reply)
        if not found:
            return invalid(f"the judge gave no score: {reply[-200:]!r}")
        score = float(found[-1]) / self._scale
        if not 0 <= score <= 1:
            return invalid(f"the judge's score {found[-1]} is outside 0 to {self._scale:g}")
        return checked_reward(score)

    def _fill(self, prompt: str, response: str, label: str) -> str:
        try:
            return self._template.format(prompt=prompt, response=response, label=label)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"reward.args.template: only {{prompt}}, {{response}} and {{label}} may be used: {error!r}"
            ) from error

    def _text_of(self, answer: Any) -> str:
        try:
            return str(answer["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError) as error:
            raise RemoteError(f"the judge answered {str(answer)[:200]!r}, expected a chat completion") from error
