"""A user's file that ends or holds the process that imports it is found by another process, within a limit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlx.cluster.checks.function_trial import trial_problems

KEY = "reward.name"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os\nos._exit(0)\n", "ended the process with status 0"),
        ("import os\nos._exit(3)\n", "ended the process with status 3"),
        ("import os\nos.kill(os.getpid(), 9)\n", "ended the process by SIGKILL"),
        ("import ctypes\nctypes.string_at(0)\n", "ended the process by SIGSEGV"),
        ("import os, sys\nos.close(int(sys.argv[3]))\nos._exit(0)\n", "ended the process with status 0"),
    ],
)
def test_what_ends_the_process(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    (problem,) = trial_problems([(KEY, f"{file}:f"), (KEY, f"{file}:g")])
    assert problem.startswith(f"{KEY}: {file}: importing it {words}")


def test_what_holds_the_process(tmp_path: Path) -> None:
    """It ends with all that it started."""
    file, mark = tmp_path / "mine.py", tmp_path / "mark"
    file.write_text(
        "import os, subprocess\n"
        f"subprocess.Popen(['sh', '-c', 'echo $$ > {mark}; sleep 600'])\n"
        f"while not os.path.exists({str(mark)!r}) or not open({str(mark)!r}).read().strip():\n    pass\n"
        "while True:\n    pass\n"
    )
    (problem,) = trial_problems([(KEY, f"{file}:f")], limit_s=4.0)
    assert "took more than 4 s" in problem
    pid = int(mark.read_text())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, f"{pid} lives on"


@pytest.mark.parametrize(
    "text",
    [
        "def f(prompt, response, label): return 1.0\n",
        "raise OSError('no')\n",
        "no Python\n",
        "import sys\nsys.exit(1)\n",
        "import threading, time\nthreading.Thread(target=time.sleep, args=[600]).start()\n",
    ],
)
def test_what_an_import_can_say_itself_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    assert list(trial_problems([(KEY, f"{file}:f")])) == []


def test_files_that_are_not_there_are_none(tmp_path: Path) -> None:
    assert list(trial_problems([(KEY, f"{tmp_path}/none.py:f")])) == []
