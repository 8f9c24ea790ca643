"""``metrics.jsonl``: one JSON object a step, flat keys, finite numbers.

The file survives a kill at any moment: rows are flushed whole, a torn last line is left out when reading, and dropping
rows for a resume replaces the file in one move.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from rlx.types.rollout import StepReport


class MetricsWriter:
    """Appends rows to ``path`` (made with its folder if missing); steps must increase (``in_order``). Use one writer a file.

    A context manager that closes the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, in_order: bool = True) -> None:
        self._path, self._in_order = Path(path), in_order
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(self._path) if self._path.exists() else []
        _replace(self._path, rows)
        self._last_step = rows[-1].step if rows else None
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, report: StepReport) -> None:
        """Append one row and flush it. Raises ValueError naming the key of a value that is not a finite number,
        and for a step that is not after the last one (``truncate_after`` first when resuming)."""
        if self._in_order and self._last_step is not None and report.step <= self._last_step:
            raise ValueError(f"metrics of step {report.step} come after those of step {self._last_step} in {self._path}")
        self._file.write(_line(report))
        self._file.flush()
        self._last_step = report.step

    def truncate_after(self, step: int) -> None:
        """Drop the rows of steps after ``step``, all or none of them: the run goes on from a checkpoint of ``step``."""
        kept = [row for row in read_metrics(self._path) if row.step <= step]
        self._file.close()
        _replace(self._path, kept)
        self._last_step = kept[-1].step if kept else None
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[StepReport]:
    """All whole rows of a ``metrics.jsonl``, in order. A last line without its newline was cut off and is left out;
    any other line that is not a row raises ValueError naming file and line."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _row(line: str, where: str) -> StepReport:
    try:
        row = json.loads(line)
        step = row.pop("step")
        return StepReport(step=step, metrics=row)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{where}: not a row of metrics: {line[:80]!r}") from error


def _line(report: StepReport) -> str:
    row: dict[str, int | float] = {"step": report.step}
    for key, value in report.metrics.items():
        if key == "step":
            raise ValueError("metric 'step' is the row's own step and cannot be a metric")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"metric {key!r} of step {report.step} is {number}, not a finite number")
        row[key] = value if isinstance(value, int) and not isinstance(value, bool) else number
    return json.dumps(row, allow_nan=False) + "\n"


def _replace(path: Path, rows: list[StepReport]) -> None:
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(_line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
