"""Reading a request's JSON object field by field, each with its type; ValueError names the field and what was wanted."""

from __future__ import annotations

from collections.abc import Mapping

_MISSING = object()


class Fields:
    """A JSON object under check. Fields that nobody asks for are ignored, as SGLang does at the top level."""

    def __init__(self, values: Mapping[str, object], where: str = "") -> None:
        self._values = values
        self._where = where

    def optional(self, name: str) -> object:
        """The field as it is; None when it is absent."""
        return self._values.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._take(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._take(name, default)
        if type(value) is not int:
            raise self._wrong(name, value, "an integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._take(name, default)
        if type(value) is not int and type(value) is not float:
            raise self._wrong(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def list_of(self, name: str) -> list[object]:
        value = self._take(name, None)
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def _take(self, name: str, default: object) -> object:
        value = self._values.get(name, _MISSING)
        if value is not _MISSING and value is not None:
            return value
        if default is None:
            raise ValueError(f"{self._where}{name} is missing")
        return default

    def _wrong(self, name: str, value: object, wanted: str) -> ValueError:
        return ValueError(f"{self._where}{name} is {str(value)[:100]!r}; wanted {wanted}")
