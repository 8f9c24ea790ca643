"""A verifier of the user's own: a function in a Python file, which may import what lies beside it."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import ModuleType

from rlx.rewards.base import checked_reward, invalid
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward

# What a function may ask for by name, after prompt text, response and label; attributes of the request.
OFFERED = ("trajectory", "messages", "finish_reason", "group")

_NOT_CALLED_FOR_A_NUMBER = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)


class PythonFunction:
    """Calls ``function(prompt_text, response, label, **extra)`` from ``path/to/file.py:function``, one call at a time.

    ``extra`` holds the row's other columns and, over them, ``reward.args``; beside them those of ``OFFERED`` that the function
    has an argument for. It returns a number, or (number, {part name: number}); anything else is an invalid verdict. Raises
    ValueError for a missing file or function, or a file that cannot be imported.
    """

    def __init__(self, name: str, args: Mapping[str, object]) -> None:
        path, _, function = name.rpartition(":")
        if not os.path.isfile(path):
            raise ValueError(f"reward.name: no such file: {path} (from {name!r})")
        self._neighbours = _Neighbours(Path(path).resolve().parent)
        with self._neighbours.importable():
            self._function = _load_function(path, function)
        self._name, self._args = name, dict(args)
        self._asked = _asked_for(self._function)

    @property
    def asks_group(self) -> bool:
        return "group" in self._asked

    def __call__(self, request: RewardRequest) -> Reward:
        prompt = request.prompt
        extra = self._by_name(prompt) | {name: getattr(request, name) for name in self._asked}
        with self._neighbours.importable():
            result = self._function(prompt.text, request.response, prompt.label, **extra)
        if not isinstance(result, tuple):
            return checked_reward(result)
        if len(result) != 2 or not isinstance(result[1], Mapping):
            return invalid(f"the verifier returned {result!r}; expected a number or (number, parts)")
        return checked_reward(result[0], result[1])

    def check_prompt(self, prompt: Prompt) -> None:
        """Bind the prompt to the function's arguments."""
        extra = self._by_name(prompt)
        try:
            signature = inspect.signature(self._function)
        except ValueError:
            return  # written in C: it does not say
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
        for name in self._asked:
            if name in extra:
                owner = "reward.args has a key" if name in self._args else "the row has a column"
                raise ValueError(
                    f"reward.name: {self._name} has an argument {name!r}, which rlx fills, but {owner} of that name; rename one"
                )
        return extra


class _Neighbours:
    """The modules of one folder. Files elsewhere, with neighbours of the same names, never meet them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: dict[str, ModuleType] = {}

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Inside, they can be imported, before all else, as what lies beside a script can; outside, nobody finds them."""
        sys.path.insert(0, str(self._folder))
        sys.modules.update(self._own)
        num_before = len(sys.modules)
        try:
            yield
        finally:
            with suppress(ValueError):
                sys.path.remove(str(self._folder))
            if len(sys.modules) != num_before:
                fresh = dict(list(sys.modules.items())[num_before:])
                tops = {name for name, module in fresh.items() if self._lies_here(module)} | self._own.keys()
                self._own |= {name: module for name, module in fresh.items() if name.partition(".")[0] in tops}
            for name in self._own:
                sys.modules.pop(name, None)

    def _lies_here(self, module: ModuleType) -> bool:
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        return any(isinstance(place, str) and Path(place).parent == self._folder for place in places)


def _asked_for(function: Callable[..., object]) -> tuple[str, ...]:
    """Those of ``OFFERED`` that ``function`` names, behind the three arguments that it gets by position."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return ()  # written in C: it does not say
    by_position = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)][:3]
    by_name = [one for one in parameters if one not in by_position and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return tuple(one.name for one in by_name if one.name in OFFERED)


def _load_function(path: str, function_name: str) -> Callable[..., object]:
    file = Path(path)
    # Registered, as dataclasses and pickle need it, under a name that is this path's alone.
    name = f"rlx_reward_{file.stem}_{hashlib.blake2b(str(file.resolve()).encode(), digest_size=6).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward.name: {path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    home = Path.cwd()
    try:
        with redirect_stdout(sys.stderr):  # what commands print is read by programs
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        # A user's file may fail in any way; all of them mean that this setting does not work.
        raise ValueError(f"reward.name: {path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(home)
    function = vars(module).get(function_name)
    if not callable(function):
        raise ValueError(f"reward.name: {path} has no function {function_name!r}")
    if any(is_kind(function) for is_kind in _NOT_CALLED_FOR_A_NUMBER):
        raise ValueError(f"reward.name: {function_name} of {path} is asynchronous or a generator; write a plain function")
    loaded: Callable[..., object] = function
    return loaded
