"""``rlx report``: every metric of every run is in the page, beside numbers computed here; what is no run is refused."""

from __future__ import annotations

import random
import re
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest

from rlx.cli.main import main
from rlx.obs.metrics import MetricsWriter
from rlx.types.rollout import StepReport


def _run(folder: Path, num_steps: int, draw: random.Random) -> list[float]:
    rewards = [draw.random() for _ in range(num_steps)]
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for step, reward in enumerate(rewards, start=1):
            every_other = {"evaluation/mean": reward / 2} if step % 2 else {}
            writer.write(StepReport(step=step, metrics={"reward/mean": reward, "perf/step_s": 1.5, **every_other}))
    (folder / "config.yaml").write_text("run: {dir: <b>x</b>}\n")
    return rewards


def test_a_page_of_two_runs(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(seed)
    rewards = {name: _run(tmp_path / name, num_steps, draw) for name, num_steps in (("long", 31), ("one-step", 1))}
    assert main(["report", str(tmp_path / "long"), str(tmp_path / "one-step")]) == 0
    path = tmp_path / "long" / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text()
    row = re.search(r"<tr><td>reward/mean</td>(.*?)</tr>", page, re.DOTALL)
    assert row is not None
    expected = [f"{f(v):.4g}" for v in rewards.values() for f in (lambda v: fmean(v[:5]), lambda v: fmean(v[-5:]), min, max)]
    assert re.findall(r"<td>(.*?)</td>", row[1]) == expected
    assert page.count("<svg") == 3 and page.index("<h2>reward") < page.index("<h2>evaluation") < page.index("<h2>perf")
    assert "&lt;b&gt;x" in page and "<b>x" not in page
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_of_chosen_metrics(tmp_path: Path, suffix: str) -> None:
    _run(tmp_path / "run", 4, random.Random(0))
    target = tmp_path / "deep" / f"curve.{suffix}"
    assert main(["report", str(tmp_path / "run"), "--plot", str(target), "--metrics", "reward/mean, perf/step_s"]) == 0
    assert target.stat().st_size > 1000


def test_what_is_no_run_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err
    MetricsWriter(tmp_path / "fresh" / "metrics.jsonl").close()
    assert main(["report", str(tmp_path / "fresh")]) == 2
    assert "no finished step yet" in capsys.readouterr().err
    _run(tmp_path / "run", 2, random.Random(0))
    assert main(["report", str(tmp_path / "run"), "--plot", str(tmp_path / "x.svg"), "--metrics", "reward/typo"]) == 2
    assert "'reward/typo'; there are: evaluation/mean, perf/step_s, reward/mean" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--plot", str(tmp_path / "x.doc")]) == 2
