"""CPU threads: the same number for a rank whatever launcher starts it, as trainers and engines take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlx.config.parts import EngineSettings
from rlx.processes import threads
from rlx.processes.child_environment import child_environment
from rlx.processes.threads import VARIABLES, thread_variables, usable_cores
from tests.unit.cluster.test_device import config_of

ROOT = Path(__file__).resolve().parents[3]
# What a rank sees once it has settled: the variables and torch's own count.
SETTLED = """
import json, os, sys
from rlx.processes.threads import forget_launchers_threads
forget_launchers_threads()
import torch
from rlx.processes.environment import rank_environment
from rlx.processes.device import take_threads
place = rank_environment()
take_threads(None, place.ranks_here)
found = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
print(json.dumps(found | {"torch": torch.get_num_threads()}), flush=True)
"""


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable sets a number, and there are eight cores."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    return monkeypatch


@pytest.mark.parametrize(("peers", "share"), [(1, "8"), (2, "4"), (3, "2"), (9, "1"), (0, "8")])
@pytest.mark.usefixtures("nothing_said")
def test_those_of_a_kind_share_all_cores(peers: int, share: str) -> None:
    assert thread_variables(None, os.environ, peers) == dict.fromkeys(VARIABLES, share)


def test_what_the_user_says_wins(nothing_said: pytest.MonkeyPatch) -> None:
    assert thread_variables(5, {"OMP_NUM_THREADS": "3"}, 2) == dict.fromkeys(VARIABLES, "5")
    assert thread_variables(None, {"OMP_NUM_THREADS": "3"}, 2) == dict.fromkeys(VARIABLES, "3")
    named = thread_variables(None, {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "1"}, 2)
    assert named == dict.fromkeys(VARIABLES, "3") | {"MKL_NUM_THREADS": "1"}


def test_the_local_launcher_and_a_nodes_engines_take_turns(tmp_path: Path, nothing_said: pytest.MonkeyPatch) -> None:
    from rlx.cluster.launch import OpenRun
    from rlx.cluster.local import LocalLaunch
    from rlx.cluster.progress import Progress
    from rlx.processes.interrupts import Interrupts

    config = config_of("cpu", ranks=2, num_engines=4)
    progress = Progress(tmp_path, total_steps=1)
    run = OpenRun(run_dir=tmp_path, progress=progress, interrupts=Interrupts(), failure_timeout_s=60)
    launch = LocalLaunch(EngineSettings.of(config), run)
    spawned: dict[str, str] = {}
    nothing_said.setattr(launch, "_spawn", lambda role, rank, argv, env: spawned.update(env))
    launch._parent_pipe = 0
    launch._spawn_worker("trainer", 0, 1)
    assert {spawned[name] for name in VARIABLES} == {"4"}
    assert {launch._env[name] for name in VARIABLES} == {"2"}
    assert child_environment(config.cluster, "id", num_peers=4, all_here=True)["OMP_NUM_THREADS"] == "2"


@pytest.mark.usefixtures("nothing_said")
def test_ray_hands_on_what_was_said_and_no_more() -> None:
    cluster = pytest.importorskip("rlx.cluster.ray.cluster", reason="ray is not installed")
    assert not set(VARIABLES) & set(cluster.actor_environment(config_of("cpu").cluster, {}))
    assert cluster.actor_environment(config_of("cpu").cluster, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def settled(*command: str, **said: str) -> list[dict[str, object]]:
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES and not name.startswith("TORCHELASTIC")}
    env |= {"PYTHONPATH": str(ROOT)} | said
    done = subprocess.run([sys.executable, *command], env=env, text=True, capture_output=True, timeout=240)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_rank_has_the_same_number_under_torchrun(tmp_path: Path) -> None:
    """torchrun's own 1 is nobody's wish; a user's 1 is."""
    program = tmp_path / "rank.py"
    program.write_text(SETTLED)
    share = max(1, usable_cores() // 2)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    wanted = {"OMP_NUM_THREADS": str(share), "MKL_NUM_THREADS": str(share), "torch": share}
    assert settled(str(program), **alone) == [wanted]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    assert settled(*torchrun) == [wanted] * 2
    ones = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "torch": 1}
    assert settled(str(program), **alone, OMP_NUM_THREADS="1") == [ones]


def test_torchruns_own_number_is_told_from_a_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys; os.environ |= {'OMP_NUM_THREADS': '1', 'TORCHELASTIC_RUN_ID': 'x'};"
        "subprocess.run([sys.executable, '-c', 'import os; from rlx.processes.threads import forget_launchers_threads as f;"
        ' f(); print(os.environ.get("OMP_NUM_THREADS"))\'])'
    )
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"PYTHONPATH": str(ROOT)}
    for said, left in (({}, "None\n"), ({"OMP_NUM_THREADS": "1"}, "1\n")):
        done = subprocess.run([sys.executable, "-c", program], env=env | said, text=True, capture_output=True, timeout=60)
        assert done.stdout == left, done.stderr


def test_a_containers_time_counts_as_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert usable_cores(tmp_path) == 64
    for text, cores in (("150000 100000\n", 2), ("max 100000\n", 64), ("10000 100000\n", 1), ("9900000 100000\n", 64), ("x", 64)):
        (tmp_path / "cpu.max").write_text(text)
        assert usable_cores(tmp_path) == cores
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for quota, cores in (("-1", 64), ("400000", 4)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert usable_cores(tmp_path) == cores
