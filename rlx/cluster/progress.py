"""What the user sees of a run: a line a start-up phase, a line a step, a table an evaluation, a summary.

Reads the run folder, writes nothing there.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TextIO

from rich.console import Console
from rich.status import Status

from rlx.obs.log import WAITING, last_phase

_COLUMNS = (
    ("empty", "batch/empty_steps", "{:.0f}"),
    ("reward", "reward/mean", "{:+.4f}"),
    ("invalid", "drops/invalid_reward", "{:.0f}"),
    ("kl", "kl/ref", "{:.5f}"),
    ("loss", "loss/policy", "{:+.4f}"),
    ("loss", "loss/train", "{:.4f}"),
    ("accuracy", "rewards/accuracy", "{:.3f}"),
    ("cut off", "response/cut_off_share", "{:.0%}"),
    ("held-out loss", "eval/loss", "{:.4f}"),
    ("mismatch", "mismatch/logprob_abs_mean", "{:.1e}"),
    ("s/step", "perf/step_s", "{:.2f}"),
    ("tokens/s", "perf/tokens_per_s", "{:.0f}"),
    ("s/evaluation", "perf/evaluate_s", "{:.2f}"),
)
_SUMMED_UP = (("mean reward", "reward/mean"), ("loss", "loss/train"), ("accuracy", "rewards/accuracy"))
# What a step's own seconds leave out.
_BESIDE_STEPS = ("perf/evaluate_s", "perf/validate_s", "perf/save_s")
_RECENT_STEPS = 20
_EVALUATED = re.compile(r"eval/(?:([^/]+)/)?([^/]+)")
_COUNTS = ("invalid", "prompts")

Row = Mapping[str, float]


class Tail:
    """Complete new lines of a growing file. ``skip_old`` starts at its present end; a file that shrinks (a resumed
    run drops rows after its checkpoint) is followed from its new end."""

    def __init__(self, path: Path, *, skip_old: bool) -> None:
        self._path = path
        self._offset = path.stat().st_size if skip_old and path.exists() else 0

    def lines(self) -> list[str]:
        if not self._path.exists():
            return []
        self._offset = min(self._offset, self._path.stat().st_size)
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode("utf-8", errors="replace").splitlines()


class Progress:
    """Call ``tick`` now and then, ``close`` before anything else writes to the terminal."""

    def __init__(self, run_dir: Path, *, total_steps: int, out: TextIO | None = None) -> None:
        self._run_dir = run_dir
        self._total_steps = total_steps
        self._console = Console(file=out or sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._metrics = Tail(run_dir / "metrics.jsonl", skip_old=True)
        self._driver_log, self._rank_log = (
            Tail(run_dir / "logs" / f"{who}-0.log", skip_old=True) for who in ("driver", "trainer")
        )
        self._shown = ""
        self._phases: list[tuple[str, float]] = []  # of the start, and when each began
        self._rows: list[Row] = []
        self._began = time.monotonic()
        self._status: Status | None = None
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()

    def say(self, line: str) -> None:
        """One line of our own."""
        self._console.print(f"rlx: {line}")

    def tick(self) -> None:
        """Show what is new."""
        for line in self._rank_log.lines():
            self._show_phase(line, is_driver=False)
        for line in self._driver_log.lines():
            self._show_phase(line, is_driver=True)
        for line in self._metrics.lines():
            row = _parse(line)
            if row is not None:
                self._rows.append(row)
                self._tell_start()
                self._console.print(step_line(row, self._total_steps) + self._time_left(row))
                for text in evaluation_table(row):
                    self._console.print(text)

    def close(self) -> None:
        """Show the rest and let go of the terminal."""
        self.tick()
        if self._status is not None:
            self._status.stop()
            self._status = None

    def summary(self) -> str:
        """The run in a few lines: reward (or loss) at both ends, time, tokens, where the model is."""
        seconds = time.monotonic() - self._began
        steps = [row for row in self._rows if "perf/step_s" in row]
        tokens = sum(row.get("perf/tokens_per_s", 0.0) * row["perf/step_s"] for row in steps)
        done = f"{len(steps)} steps in {_duration(seconds)}, {tokens:.0f} tokens"
        if self._rows and not steps:
            done = f"evaluation in {_duration(seconds)}"
        lines = [f"rlx: done: {done}"]
        for label, key in _SUMMED_UP:
            values = [row[key] for row in self._rows if key in row]
            if values:
                lines.append(f"rlx: {label}: {_first_and_last(values)}")
        if (self._run_dir / "hf").is_dir():
            lines.append(f"rlx: model: {self._run_dir / 'hf'}")
        lines.append(f"rlx: run folder: {self._run_dir}")
        return "\n".join(lines)

    def _time_left(self, row: Row) -> str:
        seconds = time_left([row for row in self._rows if "perf/step_s" in row], self._total_steps)
        return f"  eta {_duration(seconds)}" if seconds and "perf/step_s" in row else ""

    def _show_phase(self, line: str, *, is_driver: bool) -> None:
        """Rank 0's log tells of loading, the driver's of all that follows."""
        _, found, text = line.partition(" NOTICE ")
        if found:
            self.say(text)
        now = last_phase(line)
        has_begun = bool(self._phases) and not self._phases[-1][0]
        if " PHASE step=" not in line or (now.step >= 0 and not is_driver) or now.name == WAITING or (has_begun and now.step < 1):
            return
        if self._status is not None:
            self._status.update(now.name if now.step < 1 else f"step {now.step}: {now.name}")
        if now.step < 1 and now.name != self._shown:
            self._shown = now.name
            self._phases.append((now.name, time.monotonic()))
            self.say(now.name)
        elif now.step >= 1 and not self._rows and self._phases and self._phases[-1][0]:
            self._phases.append(("", time.monotonic()))  # the first step began

    def _tell_start(self) -> None:
        """Where the time went until the first step, once."""
        phases, self._phases = self._phases, []
        if not phases or phases[-1][0]:
            return
        parts = [(name, end - begin) for (name, begin), (_, end) in pairwise(phases)]
        parts = [("begin", phases[0][1] - self._began), *parts]
        told = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts if seconds >= 1.0)
        if told:
            self.say(f"first step after {phases[-1][1] - self._began:.0f} s: {told}")


def step_line(row: Row, total_steps: int) -> str:
    """``step 3/100  reward +0.5000  kl 0.00100 ...``; measures that a run does not have are left out."""
    cells = [f"step {int(row['step'])}/{total_steps}"]
    cells += [f"{label} {shape.format(row[key])}" for label, key, shape in _COLUMNS if key in row]
    return "  ".join(cells)


def time_left(steps: Sequence[Row], total_steps: int) -> float:
    """Seconds to the end, as the last steps go; evaluation and saving count for each as much as they took on average."""
    if not steps:
        return 0.0
    beside = fmean(sum(row.get(key, 0.0) for key in _BESIDE_STEPS) for row in steps)
    each = fmean(row["perf/step_s"] for row in steps[-_RECENT_STEPS:]) + beside
    return max(0.0, total_steps - steps[-1]["step"]) * each


def evaluation_table(row: Row) -> list[str]:
    """A line a metric and a column a set, for the answers to evaluation prompts in a row; empty when there are none."""
    sets: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        match = _EVALUATED.fullmatch(key)
        if match is not None:
            sets.setdefault(match[1] or "eval", {})[match[2]] = value
    sets = {name: metrics for name, metrics in sets.items() if "prompts" in metrics}
    if not sets:
        return []
    metrics = list(dict.fromkeys(metric for found in sets.values() for metric in found))
    table = [["", *sets]]
    for metric in metrics:
        shape = "{:.0f}" if metric in _COUNTS else "{:.4f}"
        table.append([metric, *(shape.format(found[metric]) if metric in found else "-" for found in sets.values())])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *cells in table:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join(["", name.ljust(widths[0]), *numbers]))
    return lines


def _parse(line: str) -> Row | None:
    """A metrics row, or None for a line that is none (a torn write)."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict) or "step" not in row:
        return None
    return {key: float(value) for key, value in row.items() if isinstance(value, int | float)}


def _first_and_last(values: Sequence[float]) -> str:
    count = min(5, len(values))
    first, last = sum(values[:count]) / count, sum(values[-count:]) / count
    if count == len(values):
        return f"{first:+.4f} over {count} step{'s' * (count > 1)}"
    return f"{first:+.4f} over the first {count} steps, {last:+.4f} over the last {count}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
