"""A verifier of the user's own: a function in a Python file."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from rlx.rewards.base import checked_reward, invalid
from rlx.types.rollout import Completion, Prompt, Reward


class PythonFunction:
    """Calls ``function(prompt_text, response, label, **extra)`` from ``path/to/file.py:function``.

    ``extra`` holds the row's other columns and, over them, ``reward.args``. The function returns a number, or (number,
    {part name: number}); anything else is an invalid verdict. Raises ValueError for a missing file or function, or a
    file that cannot be imported.
    """

    def __init__(self, name: str, args: Mapping[str, object]) -> None:
        self._function = _load_function(name)
        self._args = dict(args)

    def __call__(self, prompt: Prompt, response_text: str, completion: Completion) -> Reward:
        extra = {**prompt.extra, **self._args}
        result = self._function(prompt.text, response_text, prompt.label, **extra)
        if not isinstance(result, tuple):
            return checked_reward(result)
        if len(result) != 2 or not isinstance(result[1], Mapping):
            return invalid(f"the verifier returned {result!r}; expected a number or (number, parts)")
        return checked_reward(result[0], result[1])


def _load_function(name: str) -> Callable[..., object]:
    path, _, function_name = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"reward.name: no such file: {path} (from {name!r})")
    spec = importlib.util.spec_from_file_location(f"rlx_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward.name: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    home = Path.cwd()
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        # A user's file may fail in any way; all of them mean that this setting does not work.
        raise ValueError(f"reward.name: {path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(home)
    function = vars(module).get(function_name)
    if not callable(function):
        raise ValueError(f"reward.name: {path} has no function {function_name!r}")
    loaded: Callable[..., object] = function
    return loaded
