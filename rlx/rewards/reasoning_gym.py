"""Answers to reasoning-gym's questions, scored by the task's own scorer (install rlx's extra ``tasks``)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from rlx.rewards.base import MissingLabelError, checked_reward
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward

Scorer = Callable[[str | None, Mapping[str, object]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningGym:
    """What the scorer of the prompt's task (made with the arguments its question was made with) says: 0 to 1, in parts for some.

    The answer is what the last ``<answer>...</answer>`` of the response holds, else (``tagged_only`` false) the whole
    response; outer whitespace is ignored. ``tag`` renames the tag. Prompts come from a source ``reasoning-gym:TASK``; others
    raise MissingLabelError. Raises ValueError at construction without reasoning-gym.
    """

    tag: str = "answer"
    tagged_only: bool = False
    _pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if find_spec("reasoning_gym") is None:
            raise ValueError("reward.name: reasoning-gym needs the package reasoning-gym (pip install 'rlx[tasks]')")
        _load()
        tag = re.escape(self.tag)
        object.__setattr__(self, "_pattern", re.compile(f"<{tag}>((?:(?!<{tag}>).)*?)</{tag}>", re.DOTALL))

    def check_prompt(self, prompt: Prompt) -> None:
        _origin_of(prompt)

    def __call__(self, request: RewardRequest) -> Reward:
        origin = _origin_of(request.prompt)
        found = self._pattern.findall(request.text)
        if not found and self.tagged_only:
            return Reward(value=0.0)
        answer = (found[-1] if found else request.response).strip()
        scorer = _scorer(str(origin["task"]), json.dumps(origin["args"], sort_keys=True))
        return checked_reward(scorer(answer, origin["entry"]))


def _origin_of(prompt: Prompt) -> Mapping[str, Any]:
    origin = prompt.extra.get("reasoning_gym")
    if not isinstance(origin, Mapping):
        raise MissingLabelError(
            f"prompt {prompt.prompt_id} of {prompt.source or 'the prompt file'} is no question of reasoning-gym"
            " (data.sources.NAME.path: reasoning-gym:TASK)"
        )
    return origin


@lru_cache(maxsize=256)
def _scorer(task: str, args: str) -> Scorer:
    scorer: Scorer = _load().create_dataset(task, **json.loads(args)).score_answer
    return scorer


def _load() -> Any:
    import reasoning_gym

    return reasoning_gym
