"""A verifier of the user's own: a function in a Python file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from rlx.config.user_function import UserFunction
from rlx.rewards.base import checked_reward, invalid
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward

# What a function may ask for by name, after prompt text, response and label; attributes of the request.
OFFERED = ("trajectory", "messages", "finish_reason", "group")


class PythonFunction:
    """Calls ``function(prompt_text, response, label, **extra)`` from ``path/to/file.py:function``, one call at a time.

    ``extra`` holds the row's other columns and, over them, ``reward.args``; beside them those of ``OFFERED`` that the function
    has an argument for. It returns a number, or (number, {part name: number}); anything else is an invalid verdict. Raises
    ValueError for a missing file or function, or a file that cannot be imported.
    """

    def __init__(self, name: str, args: Mapping[str, object]) -> None:
        self._function = UserFunction("reward.name", name)
        self._name, self._args = name, dict(args)
        self._asked = _asked_for(self._function.signature)
        by_position = _by_position(self._function.signature)
        self._takes_label = any(one.name == "label" and one.kind != one.POSITIONAL_ONLY for one in by_position[2:])

    @property
    def asks_group(self) -> bool:
        return "group" in self._asked

    def __call__(self, request: RewardRequest) -> Reward:
        prompt = request.prompt
        extra = self._by_name(prompt) | {name: getattr(request, name) for name in self._asked}
        result = self._function(prompt.text, request.response, prompt.label, **extra)
        if not isinstance(result, tuple):
            return checked_reward(result)
        if len(result) != 2 or not isinstance(result[1], Mapping):
            return invalid(f"the verifier returned {result!r}; expected a number or (number, parts)")
        return checked_reward(result[0], result[1])

    def check_prompt(self, prompt: Prompt) -> None:
        """Bind the prompt to the function's arguments."""
        extra = self._by_name(prompt)
        signature = self._function.signature
        if signature is None:
            return
        try:
            signature.bind(prompt.text, "", prompt.label, **extra, **dict.fromkeys(self._asked))
        except TypeError as error:
            raise ValueError(
                f"reward.name: {self._name}{signature} cannot be called with this row: {error}; after prompt text, response and"
                f" label it gets by name the row's other columns and reward.args ({', '.join(extra) or 'none here'}); where it"
                f" names them also {', '.join(OFFERED)}"
            ) from error

    def _by_name(self, prompt: Prompt) -> dict[str, object]:
        """The row's other columns and reward.args; ValueError where one is called like what the function asks for."""
        extra = {**prompt.extra, **self._args}
        if self._takes_label and "label" not in self._args:
            # data.label_key names another column as the label: that one is what the argument of this name gets.
            extra.pop("label", None)
        for name in self._asked:
            if name in extra:
                owner = "reward.args has a key" if name in self._args else "the row has a column"
                raise ValueError(
                    f"reward.name: {self._name} has an argument {name!r}, which rlx fills, but {owner} of that name; rename one"
                )
        return extra


def _asked_for(signature: inspect.Signature | None) -> tuple[str, ...]:
    """Those of ``OFFERED`` that a function names, behind the three arguments that it gets by position."""
    parameters = [] if signature is None else list(signature.parameters.values())
    by_position = _by_position(signature)
    by_name = [one for one in parameters if one not in by_position and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return tuple(one.name for one in by_name if one.name in OFFERED)


def _by_position(signature: inspect.Signature | None) -> list[inspect.Parameter]:
    """The parameters that take prompt text, response and label."""
    parameters = [] if signature is None else list(signature.parameters.values())
    return [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)][:3]
