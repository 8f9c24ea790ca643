"""Importing transformers for its tokenizers alone, which takes a third of the time that it takes with torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torch_hidden() -> Iterator[None]:
    """Inside, nobody finds torch. What transformers finds missing stays missing to it as long as the process lives, so this is
    for processes that load no models; torch itself can be imported afterwards. Changes nothing where torch is loaded."""
    if sys.modules.get("torch") is not None:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that models cannot be loaded
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
