"""A function of the user's own, ``path/to/file.py:function``; the file may import what lies beside it."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import ModuleType

_NOT_PLAIN = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)


class UserFunction:
    """The function that the key ``key`` names. Raises ValueError for a missing file or function, or a file that cannot be
    imported."""

    def __init__(self, key: str, name: str) -> None:
        path, _, function = name.rpartition(":")
        if not os.path.isfile(path):
            raise ValueError(f"{key}: no such file: {path} (from {name!r})")
        self._neighbours = _Neighbours(Path(path).resolve().parent)
        with self._neighbours.importable():
            self._function = _load(key, path, function)
        try:
            self.signature: inspect.Signature | None = inspect.signature(self._function)
        except ValueError:
            self.signature = None  # written in C: it does not say

    def __call__(self, *args: object, **named: object) -> object:
        with self._neighbours.importable():
            return self._function(*args, **named)


def form_problem(key: str, name: str) -> str | None:
    """What is wrong with ``path/to/file.py:function`` before the file is read; None where nothing is, or there is no colon."""
    path, colon, function = name.rpartition(":")
    if not colon:
        return None
    if Path(path).suffix != ".py" or not function.isidentifier():
        return f"{key}: {name!r} must have the form path/to/file.py:function"
    return None if os.path.isfile(path) else f"{key}: no such file {path}"


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


def _load(key: str, path: str, function_name: str) -> Callable[..., object]:
    file = Path(path)
    # Registered, as dataclasses and pickle need it, under a name that is this path's alone.
    name = f"rlx_user_{file.stem}_{hashlib.blake2b(str(file.resolve()).encode(), digest_size=6).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{key}: {path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    home = Path.cwd()
    try:
        with redirect_stdout(sys.stderr):  # what commands print is read by programs
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        # A user's file may fail in any way; all of them mean that this setting does not work.
        raise ValueError(f"{key}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(home)
    function = vars(module).get(function_name)
    if not callable(function):
        raise ValueError(f"{key}: {path} has no function {function_name!r}")
    if any(is_kind(function) for is_kind in _NOT_PLAIN):
        raise ValueError(f"{key}: {function_name} of {path} is asynchronous or a generator; write a plain function")
    loaded: Callable[..., object] = function
    return loaded
