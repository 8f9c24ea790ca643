"""What ``launch/torchrun.sh`` makes of the signals it gets; a stand-in plays torchrun and its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.job import ROOT

LATER = 0
# Leaves well when the run is asked to save; ends with status 1 on SIGTERM, as torchrun does.
STAND_IN = """#!{python}
import os, signal, sys, time
from rlx.processes.stopping import StopRequest
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
stop = StopRequest()
open({started!r}, "w").close()
while not stop.is_set() or {stubborn}:
    time.sleep(0.02)
open(os.environ["RLX_REQUEUE_FILE"], "w").write("requeue")
"""


@pytest.mark.parametrize(
    ("numbers", "stubborn", "status"),
    [
        ((signal.SIGUSR1,), False, 75),
        ((signal.SIGTERM,), False, 75),
        ((signal.SIGTERM, signal.SIGTERM), False, 75),
        ((signal.SIGUSR1, signal.SIGTERM, LATER, signal.SIGTERM), True, 143),
        ((signal.SIGHUP,), True, 129),
    ],
)
def test_the_first_sigterm_asks_to_save_and_a_second_one_ends(
    tmp_path: Path, numbers: tuple[int, ...], stubborn: bool, status: int
) -> None:
    python, started = tmp_path / "python", tmp_path / "started"
    python.write_text(STAND_IN.format(python=sys.executable, started=str(started), stubborn=stubborn))
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = subprocess.Popen([str(ROOT / "launch" / "torchrun.sh"), "config.yaml"], env=env)
    deadline = time.monotonic() + 60
    while not started.exists():
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for number in numbers:
        if number == LATER:
            time.sleep(5.1)  # what comes sooner is taken for the same request
        else:
            script.send_signal(number)
        time.sleep(0.1)
    assert script.wait(60) == status
    assert not list(tmp_path.glob("rlx-node.*"))
