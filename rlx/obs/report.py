"""One HTML page of a run, or of several laid over each other: every metric's curve, a table of beginnings and ends, the
configuration. The page is one file: pictures are inside it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from jinja2 import Environment
from matplotlib.figure import Figure

from rlx.obs.metrics import read_metrics
from rlx.types.rollout import StepReport

# The order in which a reader asks: does it learn, is it sound, what does it cost. Other groups follow by name.
GROUPS = ("reward", "evaluation", "response", "loss", "kl", "policy", "mismatch", "drops", "sync", "perf", "memory")
EDGE_STEPS = 5

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { padding: .15rem .8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #f4f4f4; }
svg { max-width: 100%; height: auto; } pre { background: #f4f4f4; padding: 1rem; overflow: auto; }
</style></head><body>
<h1>{{ title }}</h1>
{% for run in runs %}<p><b>{{ run.name }}</b>: {{ run.rows | length }} steps, {{ run.rows[0].step }} to {{ run.rows[-1].step }},
in {{ run.folder }}</p>{% endfor %}
{% for group in groups %}<h2>{{ group.name }}</h2>{{ group.svg | safe }}{% endfor %}
<h2>First and last {{ edge }} steps</h2>
<table><tr><th>metric</th>{% for run in runs %}<th colspan="4">{{ run.name }}</th>{% endfor %}</tr>
<tr><th></th>{% for run in runs %}<th>first</th><th>last</th><th>least</th><th>most</th>{% endfor %}</tr>
{% for row in table %}<tr><td>{{ row.metric }}</td>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for run in runs if run.config %}<details><summary>Configuration of {{ run.name }}</summary>
<pre>{{ run.config }}</pre></details>
{% endfor %}</body></html>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run folder holds for a report."""

    name: str
    folder: Path
    rows: tuple[StepReport, ...]
    config: str | None

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of the rows that have ``metric``."""
        rows = [row for row in self.rows if metric in row.metrics]
        return [row.step for row in rows], [float(row.metrics[metric]) for row in rows]


def read_run(folder: Path) -> Run:
    """Raises ValueError when the folder holds no metrics, or none yet."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no metrics.jsonl")
    rows = tuple(read_metrics(path))
    if not rows:
        raise ValueError(f"{path} has no finished step yet")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else None
    return Run(name=folder.resolve().name, folder=folder, rows=rows, config=text)


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Every metric of any run, grouped by what stands before the slash, groups in a reader's order."""

    def place(name: str) -> tuple[int, str]:
        group = name.partition("/")[0]
        return (GROUPS.index(group) if group in GROUPS else len(GROUPS), name)

    return sorted({name for run in runs for row in run.rows for name in row.metrics}, key=place)


def plot(runs: Sequence[Run], metrics: Sequence[str]) -> Figure:
    """A panel a metric, a line a run. Raises ValueError naming a metric that no run has."""
    known = set(metric_names(runs))
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"no run has the metric {metric!r}; there are: {', '.join(sorted(known))}")
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, metric in zip(panels, metrics, strict=False):
        for run in runs:
            steps, values = run.curve(metric)
            panel.plot(steps, values, linewidth=1.2, marker="." if len(steps) < 25 else None, label=run.name)
        panel.set_title(metric, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    for panel in panels[len(metrics) :]:
        panel.remove()
    if len(runs) > 1:
        panels[0].legend(fontsize=7)
    return figure


def render(runs: Sequence[Run]) -> str:
    """The page."""
    names = metric_names(runs)
    by_group: dict[str, list[str]] = {}
    for name in names:
        by_group.setdefault(name.partition("/")[0], []).append(name)
    groups = [{"name": group, "svg": _svg(plot(runs, metrics))} for group, metrics in by_group.items()]
    table = [{"metric": name, "cells": [cell for run in runs for cell in _cells(run, name)]} for name in names]
    title = "rlx: " + ", ".join(run.name for run in runs)
    page: Mapping[str, object] = {"title": title, "runs": runs, "groups": groups, "table": table, "edge": EDGE_STEPS}
    return Environment(autoescape=True).from_string(_PAGE).render(page)


def _cells(run: Run, metric: str) -> list[str]:
    values = run.curve(metric)[1]
    if not values:
        return ["-"] * 4
    return [f"{value:.4g}" for value in (fmean(values[:EDGE_STEPS]), fmean(values[-EDGE_STEPS:]), min(values), max(values))]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML prologue, which HTML does not know
