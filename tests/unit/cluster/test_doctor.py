"""Findings: each kind of trouble is told with what to do; the command's two forms agree."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from rlx.cli.main import main
from rlx.cluster import doctor
from tests.e2e.job import ROOT


def test_versions_against_the_tested_ones() -> None:
    tested = doctor.parse_constraints("# a comment\ntorch==2.11.0\nhuggingface_hub==1.33.0  # why\n")
    assert tested == {"torch": "2.11.0", "huggingface-hub": "1.33.0"}
    assert doctor.compare("torch", "2.11.0+cu130", tested).status == "ok"
    other = doctor.compare("torch", "2.12.0", tested)
    assert other.status == "note" and "torch==2.11.0" in other.advice
    assert doctor.compare("torch", None, tested).status == "bad"
    assert doctor.compare("ray", None, tested, optional="Ray").status == "note"
    assert "torch" in doctor.tested_versions()


def test_space_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.space("x", tmp_path, 2**60, "more").advice == "more"
    assert doctor.space("x", tmp_path / "none", 1, "more").status == "bad"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    files = next(finding for finding in doctor.examine(tmp_path / "a" / "b") if finding.subject == "open files")
    assert files.status == "note" and "ulimit -n 4096" in files.advice and "1024" in files.advice


def test_a_foreign_apex_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.9.10dev" if name == "apex" else "1.0")
    found = {finding.subject: finding for finding in doctor.examine(Path("runs"))}
    assert found["apex"].status == "bad" and "launch/install.sh" in found["apex"].advice


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status = main(["doctor", "--json", "--run-dir", str(tmp_path)])
    findings = json.loads(capsys.readouterr().out)
    assert status == int(any(finding["status"] == "bad" for finding in findings))
    assert {"python", "torch", "megatron-core", "apex", "gpus", "ports", "shared memory"} <= {f["subject"] for f in findings}
    assert all(finding["advice"] for finding in findings if finding["status"] != "ok")
    main(["doctor", "--run-dir", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == len(findings)
    assert (ROOT / "launch" / "constraints.txt").is_file()
