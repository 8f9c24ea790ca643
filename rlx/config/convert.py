"""From a plain tree (what YAML holds) to the frozen dataclasses of ``schema`` and back, with every problem collected.

Conversions are lenient only where nothing can be misread: an integer or a numeric string ("1e-5") is a float, null is
None where the field allows it. A bool is never a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rlx.config.options import LARGEST, broken_limits, is_near, nearest_key
from rlx.config.schema import Config

# Far below where writing and reading it again would end.
_MAX_DEPTH = 50
UNSET = "???"  # OmegaConf's mark for "to be filled in"

_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of the schema: its full dotted name, its type, and the dataclass field it comes from."""

    key: str
    hint: Any
    field: Field[Any]

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.hint)

    @property
    def is_required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    def default(self) -> Any:
        """The default, or a blank of the right type for a required key (so that the other keys can be checked too)."""
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return self.hint() if self.field.default is MISSING else self.field.default


@dataclass(slots=True)
class Problems:
    """What is wrong so far, and the keys whose values cannot be trusted."""

    messages: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    def add(self, key: str, message: str) -> None:
        self.keys.add(key)
        self.messages.append(f"{key}: {message}")


@cache
def section_entries(section: type, prefix: str = "") -> tuple[Entry, ...]:
    """The keys of one section class, in order; ``prefix`` is its own key with a dot, "" for the root."""
    hints = get_type_hints(section)
    return tuple(Entry(f"{prefix}{item.name}", hints[item.name], item) for item in fields(section))


def all_entries(section: type = Config, prefix: str = "") -> Iterator[Entry]:
    """Every section and key of the schema, depth first."""
    for entry in section_entries(section, prefix):
        yield entry
        if entry.is_section:
            yield from all_entries(entry.hint, f"{entry.key}.")


def to_config(tree: Mapping[str, Any]) -> tuple[Config, Problems]:
    """Convert a resolved tree. Where a value is wrong the default stands in; use the Config only if nothing is wrong."""
    problems = Problems()
    return _to_section(Config, tree, "", problems), problems


def to_tree(section: Any) -> dict[str, Any]:
    """The plain tree of a configuration, every key spelt out; ``to_config`` reads it back."""
    return {item.name: _plain(getattr(section, item.name)) for item in fields(section)}


def row_class(hint: Any) -> type | None:
    """The dataclass of the values of a mapping by free names (``Mapping[str, SourceConfig]``), None for any other type."""
    arguments = get_args(hint)
    is_rows = get_origin(hint) is Mapping and isinstance(arguments[1], type) and is_dataclass(arguments[1])
    return arguments[1] if is_rows else None


def type_words(hint: Any) -> str:
    """A type in words: ``an integer or null``."""
    if _is_optional(hint):
        return f"{type_words(_inner(hint))} or null"
    if get_origin(hint) is list:
        return f"a list, each item {type_words(get_args(hint)[0])}"
    return _WORDS.get(hint, "a mapping")


def _to_section(section: type, tree: Mapping[str, Any], prefix: str, problems: Problems) -> Any:
    entries = section_entries(section, prefix)
    names = {entry.field.name for entry in entries}
    for name, value in tree.items():
        if name not in names:
            _report_unknown(f"{prefix}{name}", value, [*all_entries(), *entries], problems)
    return section(**{entry.field.name: _to_entry(entry, tree, problems) for entry in entries})


def _report_unknown(key: str, value: Any, entries: Sequence[Entry], problems: Problems) -> None:
    wants_section = isinstance(value, Mapping) and "." not in key
    known = [entry.key for entry in entries if entry.is_section == wants_section]
    nearest, section = nearest_key(key, known), key.rpartition(".")[0]
    if is_near(key, nearest):
        problems.add(key, f"unknown key; the nearest one is {nearest}")
        return
    beside = dict.fromkeys(one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == section)
    sections = dict.fromkeys(entry.key for entry in entries if entry.is_section)
    words = f"{section} has {', '.join(beside)}" if section and beside else f"the sections are {', '.join(sections)}"
    problems.add(key, f"unknown key; {words}")


def _to_entry(entry: Entry, tree: Mapping[str, Any], problems: Problems) -> Any:
    name = entry.field.name
    if entry.is_section:
        below = tree.get(name, {})
        if not isinstance(below, Mapping):
            problems.add(entry.key, f"expected a section of keys, got {_show(below)}")
            below = {}
        return _to_section(entry.hint, below, f"{entry.key}.", problems)
    if entry.is_required and tree.get(name, UNSET) in (UNSET, None):
        problems.add(entry.key, f"required but missing ({entry.field.metadata['doc']})")
        return entry.default()
    if name not in tree:
        return entry.default()
    before = len(problems.messages)
    value = _to_value(entry.key, entry.hint, tree[name], problems)
    if len(problems.messages) == before and value is not None:
        _check_limits(entry, value, problems)
    if len(problems.messages) == before:
        return value
    problems.keys.add(entry.key)  # of a list or a mapping too, of which one item is wrong
    return entry.default()


def _to_value(key: str, hint: Any, value: Any, problems: Problems) -> Any:
    if isinstance(value, str) and value == UNSET:
        problems.add(key, f"left open ({UNSET}); expected {type_words(hint)}")
        return None
    if _is_optional(hint):
        return None if value is None else _to_value(key, _inner(hint), value, problems)
    if get_origin(hint) is list and isinstance(value, list):
        return [_to_value(f"{key}[{i}]", get_args(hint)[0], item, problems) for i, item in enumerate(value)]
    row = row_class(hint)
    if row is not None and isinstance(value, Mapping):
        return _to_rows(key, row, value, problems)
    if hint is float and not isinstance(value, bool):
        value = _to_float(value)
    if isinstance(value, _runtime_class(hint)) and isinstance(value, bool) == (hint is bool):
        if isinstance(value, Mapping):
            _check_free(key, value, problems)
        return value
    problems.add(key, f"expected {type_words(hint)}, got {_show(value)}")
    return None


def _to_rows(key: str, row: type, value: Mapping[Any, Any], problems: Problems) -> dict[str, Any]:
    rows = {}
    for name, below in value.items():
        if isinstance(name, str) and isinstance(below, Mapping):
            rows[name] = _to_section(row, below, f"{key}.{name}.", problems)
        else:
            problems.add(f"{key}.{name}", f"expected a name and a section of keys, got {_show(below)}")
    return rows


def _check_free(key: str, value: Any, problems: Problems) -> None:
    """A free mapping passes as it is; only what could not be written out and read back is refused."""
    if key.count(".") + key.count("[") > _MAX_DEPTH:
        problems.add(key[:200], f"nests more than {_MAX_DEPTH} deep")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                problems.add(key, f"names must be strings, got {_show(name)}")
            _check_free(f"{key}.{name}", item, problems)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_free(f"{key}[{i}]", item, problems)
    elif value == UNSET:
        problems.add(key, f"left open ({UNSET}); give it a value")
    elif isinstance(value, float) and not math.isfinite(value):
        problems.add(key, f"expected a finite number, got {value}")


def _check_limits(entry: Entry, value: Any, problems: Problems) -> None:
    choices = entry.field.metadata["choices"]
    if choices and value not in choices:
        problems.add(entry.key, f"expected one of {', '.join(choices)}, got {_show(value)}")
    if isinstance(value, str) and not value.strip() and not entry.field.metadata["may_be_empty"]:
        problems.add(entry.key, "must not be empty" + ("; null leaves it out" if _is_optional(entry.hint) else ""))
    if type(value) in LARGEST:
        for words in broken_limits(value, entry.field.metadata["limits"]):
            problems.add(entry.key, f"must be {words}, got {value}")


def _to_float(value: Any) -> Any:
    """``value`` as a finite float if it is one in any natural spelling, else unchanged."""
    if not isinstance(value, int | float | str):
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return value
    if math.isfinite(number):
        return number
    return value if isinstance(value, str) else repr(value)


def _is_optional(hint: Any) -> bool:
    return isinstance(hint, UnionType) and NoneType in get_args(hint)


def _inner(hint: Any) -> Any:
    return next(option for option in get_args(hint) if option is not NoneType)


def _runtime_class(hint: Any) -> type:
    origin: type = get_origin(hint) or hint
    return origin


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_tree(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _show(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value!r} ({type(value).__name__})"
