"""The Dockerfile and the install script agree with each other and with the pins."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from rlx.cluster.doctor import parse_constraints
from rlx.rollout.sglang import TESTED
from tests.e2e.job import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
SCRIPT = ROOT / "launch" / "install.sh"


def test_stages_of_the_image_are_the_scripts() -> None:
    used = re.findall(r"RUN \S+install\.sh (\w+)", DOCKERFILE)
    every = re.search(r"for each in ([\w ]+);", SCRIPT.read_text())
    assert every and sorted(used) == sorted(every.group(1).split()) and used[0] == "torch" and used[-1] == "rlx"
    assert subprocess.run([str(SCRIPT), "nonsense"], capture_output=True).returncode == 2


def test_image_is_pinned_not_root_and_ends_with_the_doctor() -> None:
    assert re.search(r"^FROM \S+:\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[-1] not in ("root", "0")
    assert re.findall(r"^RUN (.*)$", DOCKERFILE, re.MULTILINE)[-1] == "rlx doctor"
    for source in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split() if name != "converters")


def test_the_supported_releases_of_sglang_are_the_tested_ones() -> None:
    """One place says which: setup.py, the Makefile's environments, a GPU installation's pin and the page about SGLang follow."""
    versions = re.search(r"^SGLANG_VERSIONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert versions and tuple(versions.group(1).split()) == TESTED
    assert parse_constraints((ROOT / "launch" / "constraints-gpu.txt").read_text())["sglang"] == TESTED[1]
    assert all(version in (ROOT / "docs" / "sglang.md").read_text() for version in TESTED)
    reads = "import runpy, setuptools; setuptools.setup = lambda **named: print(*named['extras_require']['gpu']); runpy.run_path"
    command = [sys.executable, "-c", f"{reads}('setup.py')"]
    requires = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert f"sglang>={TESTED[0]},<={TESTED[1]}" in requires.split()


@pytest.mark.slow
def test_pins_go_together() -> None:
    if not shutil.which("uv"):
        pytest.skip("needs uv")
    done = subprocess.run([str(SCRIPT), "resolve"], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    pinned = parse_constraints((ROOT / "launch" / "constraints-gpu.txt").read_text())
    assert pinned.items() <= parse_constraints(done.stdout).items()
