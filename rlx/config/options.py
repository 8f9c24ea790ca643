"""How a field of the schema is declared: default, help, allowed values, limits."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, doc: str, *, choices: tuple[str, ...] = (), minimum: float | None = None) -> Any:
    """A documented field; mutable defaults are copied for each instance."""
    metadata = {"doc": doc, "choices": choices, "minimum": minimum}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(doc: str) -> Any:
    """A documented field without a default: leaving it out is an error that names it."""
    return field(metadata={"doc": doc, "choices": (), "minimum": None})


def by_algorithm(doc: str, *, choices: tuple[str, ...] = (), minimum: float | None = None) -> Any:
    """A field whose default depends on ``algorithm.name``; it is never None once the section is made."""
    return option(None, f"{doc} (default: the algorithm's own)", choices=choices, minimum=minimum)
