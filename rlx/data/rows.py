"""Reading files of rows: JSONL and parquet alike, with errors that name the file and the line; and what a column holds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import cast

import pyarrow
import pyarrow.parquet

from rlx.config.sources import files_of
from rlx.types.rollout import Prompt

Row = dict[str, object]

# Far above what rows hold, and far below where pickling and writing them again would end.
MAX_DEPTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How rows are looked at before a run: at the first ``num_rows`` of each file (None: all), which belong to
    ``source`` ("": the file's own name; ``seed`` is that of a task without one), and what a row's token ids and prompts must be
    beside readable (or ValueError)."""

    num_rows: int | None = None
    source: str = ""
    seed: int = 0
    check_ids: Callable[[Sequence[int]], None] = lambda token_ids: None
    check_prompt: Callable[[Prompt], None] = lambda prompt: None


EVERY_ROW = Look()


def has_more(rows: Iterator[tuple[str, Row]], look: Look) -> bool:
    """Whether there are further ``rows`` than the ``look`` was for."""
    return look.num_rows is not None and next(rows, None) is not None


@contextmanager
def placed(where: str) -> Iterator[None]:
    """ValueErrors from here begin with ``where``: a file and line, or a key."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def row_digest(row: Row) -> bytes:
    """Names what a row says: other values give another one; how a file spells them (key order, nulls) does not matter."""
    return hashlib.blake2b(json.dumps(_said(row), sort_keys=True).encode(), digest_size=16).digest()


def _said(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _said(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_said(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if value is None or isinstance(value, str | int | float):
        return value
    # An object that does not describe itself would be named by its address.
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else repr(value)


def read_rows(path: str) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each row of ``path``, a file or a folder of files; ``where`` names file and line for errors.
    Blank lines are skipped.

    Raises ValueError for a missing or unreadable file, an unknown suffix, and a line that is no JSON object, nests deeper than
    MAX_DEPTH or holds text that is no Unicode.
    """
    for file in files_of(path):
        yield from read_jsonl(file) if file.suffix == ".jsonl" else _read_parquet(file)


def read_jsonl(file: Path) -> Iterator[tuple[str, Row]]:
    """As ``read_rows``, whatever the file's name ends in."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}:{number}"
                    with placed(where):
                        row = _parsed(line)
                    yield where, row
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error


def column(row: Row, key: str) -> object:
    """What the row holds under ``key``: the column of that name, else (``a.b``) the field b of the object in column a."""
    found: object = row
    for name in (key,) if key in row else key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def columns_in(row: Row) -> str:
    """The row's columns in words, for errors about one that is missing; a null counts as missing, so it is said."""
    names = (f"{name} (null here)" if value is None else name for name, value in row.items())
    return f"the columns are {', '.join(names) or 'none'}"


def label_in(row: Row, key: str) -> object:
    """The label as verifiers compare it: numbers as text, whole ones without a fraction (``2.0`` is "2"); NaN is None.

    Other types (true, lists, objects) stay what they are: only some verifiers can say what those mean.
    """
    value = column(row, key)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    if isinstance(value, int):  # which may be too large for what comes next
        return str(value)
    if not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return str(int(value)) if value == int(value) else str(value)


def without_nulls(value: object) -> object:
    """``value`` without the keys that are null, at any depth: a parquet file has every key of a struct in every row."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _parsed(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH or b"\\u" in line:
        _check_values(row)
    return cast(Row, row)


def _check_values(row: Row) -> None:
    """ValueError for what JSON can spell and nothing after it can handle: deep nesting, halves of surrogate pairs."""
    left: list[tuple[object, int]] = [(row, 0)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            left += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list):
            left += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"a text holds {value[error.start]!a}, half of a surrogate pair, which is no text") from None


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield f"{file}: row {number}", {name: without_nulls(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as parquet after row {number}: {error}") from error
