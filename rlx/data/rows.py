"""Reading prompt files: JSONL and parquet into rows, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pyarrow
import pyarrow.parquet

Row = dict[str, object]


def read_rows(path: str) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for each row of ``path``; ``where`` names file and line for errors. Blank lines are skipped.

    Raises ValueError for a missing or unreadable file, an unknown suffix, or a line that is no JSON object.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"prompt file {path} does not exist")
    if file.suffix == ".jsonl":
        return _read_jsonl(file)
    if file.suffix == ".parquet":
        return _read_parquet(file)
    raise ValueError(f"prompt file {path} must end in .jsonl or .parquet")


def _read_jsonl(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield where, cast(Row, row)


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", cast(Row, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read as parquet: {error}") from error
