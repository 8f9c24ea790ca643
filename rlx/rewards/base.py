"""What a verifier is: a function from an answer, and how it came about, to a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward


class Verifier(Protocol):
    def __call__(self, request: RewardRequest) -> Reward:
        """Judge one answer. May raise: the sample is then invalid. Those that wait for a server are called from several threads
        at once."""


@runtime_checkable
class GroupMinded(Protocol):
    """A verifier that may ask for the other answers to the same prompt."""

    @property
    def asks_group(self) -> bool:
        """Whether requests must carry the group."""


def asks_group(verifier: Verifier) -> bool:
    """Whether ``verifier`` looks at ``RewardRequest.group``."""
    return isinstance(verifier, GroupMinded) and verifier.asks_group


@runtime_checkable
class Warmable(Protocol):
    """A verifier whose first verdicts take longer than later ones."""

    def warm_up(self) -> None:
        """Do what is done once, before the processes that judge are made as copies of this one."""


def warm_up(verifier: Verifier) -> None:
    """Warm ``verifier`` up if it asks for it."""
    if isinstance(verifier, Warmable):
        verifier.warm_up()


@runtime_checkable
class Particular(Protocol):
    """A verifier that not every prompt suits."""

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise ValueError where no answer to ``prompt`` could be judged."""


def check_prompt(verifier: Verifier, prompt: Prompt) -> None:
    """ValueError for a prompt that ``verifier`` could not judge any answer to, as far as it can say without one."""
    if isinstance(verifier, Particular):
        verifier.check_prompt(prompt)


class MissingLabelError(ValueError):
    """A verifier that compares with the label met a prompt without one."""


def label_of(prompt: Prompt) -> str:
    """The prompt's label; ValueError (MissingLabelError for none) names the prompt and its file."""
    if prompt.label is None:
        raise MissingLabelError(
            f"prompt {prompt.prompt_id} of {prompt.source or 'the prompt file'} has no label (data.label_key)"
        )
    if not isinstance(prompt.label, str):
        raise ValueError(f"the label of prompt {prompt.prompt_id} is {type(prompt.label).__name__}, not text or a number")
    return prompt.label


def verdict(is_right: bool) -> Reward:
    """1 for right, 0 for wrong."""
    return Reward(value=1.0 if is_right else 0.0)


def invalid(error: str) -> Reward:
    """A verdict that counts for nothing, and why."""
    return Reward(value=0.0, valid=False, error=error)


def checked_reward(value: object, parts: Mapping[Any, object] | None = None) -> Reward:
    """A Reward from what a verifier returned; invalid unless the value and all parts are finite real numbers."""
    named = {str(name): part for name, part in (parts or {}).items()}
    for what, number in (("verifier returned", value), *((f"verifier's part {name!r} is", part) for name, part in named.items())):
        if not is_finite_number(number):
            return invalid(f"the {what} {number!r}, which is not a finite number")
    return Reward(value=float(value), parts={name: float(part) for name, part in named.items()})  # type: ignore[arg-type]


def bounded(reward: Reward, max_abs: float) -> Reward:
    """``reward`` if it can be learned from: invalid unless its value and parts are finite numbers of at most ``max_abs``."""
    if not reward.valid:
        return reward
    checked = checked_reward(reward.value, reward.parts)
    if not checked.valid:
        return checked
    for what, number in (("reward", checked.value), *((f"reward's part {name!r}", part) for name, part in checked.parts.items())):
        if abs(number) > max_abs:
            return invalid(f"the {what} is {number:g}, beyond reward.max_abs = {max_abs:g}")
    return checked


def judge(verifier: Verifier, request: RewardRequest, max_abs: float) -> Reward:
    """The verdict, invalid for whatever the verifier raises and whatever ``bounded`` refuses."""
    try:
        return bounded(verifier(request), max_abs)
    except (Exception, SystemExit) as error:
        # Verifiers are users' code: whatever they raise makes this sample invalid, never the run fail.
        return invalid(f"{type(error).__name__}: {error}")


def is_finite_number(value: object) -> bool:
    """True for finite real numbers (bool, int, float, NumPy scalars)."""
    return isinstance(value, Real) and math.isfinite(value)
