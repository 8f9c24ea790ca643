"""Torch's pickles read without torch, and without running anything that they name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any

_KEPT: dict[tuple[str, str], type] = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}


class Plain:
    """Stands for a value of any class: the arguments that it was made with, and its attributes. What is named and not made,
    as ``torch.bfloat16``, is a class of that ``__name__``."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.args = state


def read_plainly(stream: IO[bytes], persistent: Callable[[Any], Any] | None = None) -> Any:
    """The pickled value, made of plain Python values and ``Plain`` ones. pickle.UnpicklingError when it is none."""
    return _Unpickler(stream, persistent).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(stream)
        if persistent is not None:
            self.persistent_load = persistent  # type: ignore[method-assign]

    def find_class(self, module: str, name: str) -> Any:
        return _KEPT.get((module, name)) or type(name, (Plain,), {"__module__": module})
