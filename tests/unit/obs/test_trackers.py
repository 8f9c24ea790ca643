"""Trackers are made only when asked for, and TensorBoard's files hold what was written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlx.config.schema import TrackerConfig
from rlx.obs.trackers import make_trackers
from rlx.types.rollout import StepReport

ROOT = Path(__file__).resolve().parents[3]


def test_none_asked_for_none_made_and_none_imported(tmp_path: Path) -> None:
    assert make_trackers(TrackerConfig(), tmp_path) == []
    code = "import sys, rlx.obs.trackers; print([m for m in ('tensorboard', 'wandb') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_tensorboard_holds_the_rows_and_a_resume_replaces_newer_ones(tmp_path: Path) -> None:
    config = TrackerConfig(tensorboard=True)
    for run in ([(1, 0.5), (2, 1.5), (3, 2.5)], [(2, 7.0), (3, 8.0)]):
        (tracker,) = make_trackers(config, tmp_path)
        for step, value in run:
            tracker.write(StepReport(step=step, metrics={"reward/mean": value}))
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5), (2, 7.0), (3, 8.0)]


def test_missing_wandb_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does to make an import fail
    with pytest.raises(ValueError, match=r"tracker\.wandb_project.*pip install"):
        make_trackers(TrackerConfig(wandb_project="p"), tmp_path)


def test_wandb_gets_the_project_the_folder_and_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "wandb.py"
    package.parent.mkdir()
    package.write_text(
        "calls = []\n"
        "class Run:\n"
        "    def log(self, data, step): calls.append((step, data))\n"
        "    def finish(self): calls.append('finish')\n"
        "def init(**settings):\n"
        "    calls.append(settings)\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tracker,) = make_trackers(TrackerConfig(wandb_project="p"), tmp_path / "run7")
    tracker.write(StepReport(step=4, metrics={"kl/ref": 0.25}))
    tracker.close()
    calls = sys.modules.pop("wandb").calls
    assert calls == [{"project": "p", "name": "run7", "dir": str(tmp_path / "run7")}, (4, {"kl/ref": 0.25}), "finish"]
