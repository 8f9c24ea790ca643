"""Whole launches with dummy children: how they end, what they say, and that nothing remains."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import psutil
import pytest

from rlx.engines.fleet import (
    Held,
    let_start,
    read_fleet,
    request_replacement,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MARK = "DUMMY_RUN"


class Run:
    """One launcher as a process. ``finish`` returns its status; output is in ``out`` and ``err``."""

    def __init__(self, run_dir: Path, behaviours: dict[str, str], engine: str = "none", *settings: str) -> None:
        self.dir = run_dir
        program = [sys.executable, str(HERE / "dummy_launch.py"), str(run_dir), json.dumps(behaviours), engine, *settings]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: str(run_dir)}
        self.out_path, self.err_path = run_dir.with_suffix(".out"), run_dir.with_suffix(".err")
        with self.out_path.open("w") as out, self.err_path.open("w") as err:
            self.process = subprocess.Popen(program, stdout=out, stderr=err, env=env, start_new_session=True)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 90
        metrics = self.dir / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) <= step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.err
            time.sleep(0.02)

    def finish(self, limit_s: float = 90) -> int:
        """The limit only catches a launcher that hangs; what a test claims about time it measures at the children."""
        return self.process.wait(limit_s)

    @property
    def out(self) -> str:
        return self.out_path.read_text()

    @property
    def err(self) -> str:
        return self.err_path.read_text()

    @property
    def last_lines(self) -> list[str]:
        return self.err.splitlines()[-3:]

    def members(self) -> list[psutil.Process]:
        """Every living process that inherited the launcher's environment, the launcher included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == str(self.dir):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_until_gone(self, limit_s: float, ports: list[int], besides: Collection[int] = ()) -> None:
        deadline = time.monotonic() + limit_s
        while (left := [p for p in self.members() if p.pid not in besides]) or any(map(is_listening, ports)):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def child(self, role: str, rank: int) -> psutil.Process:
        """The process whose log that is."""
        log = f"{self.dir}/logs/{role}-{rank}.log"
        return next(p for p in psutil.Process(self.process.pid).children() if os.readlink(f"/proc/{p.pid}/fd/1") == log)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[object]:
    runs: list[Run] = []

    def start(*args: object) -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}", *args))  # type: ignore[arg-type]
        return runs[-1]

    yield start
    for run in runs:
        for process in run.members():
            process.kill()
        run.process.kill()
        run.process.wait()


def grandchild_ports(run: Run) -> list[int]:
    return [int((run.dir / f"{name}.port").read_text()) for name in ("inner", "outer")]


def has_ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def urls_of(run: Run) -> list[str]:
    return [member.url for member in read_fleet(run.dir / "engines.json").members]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_done(launch) -> None:
    run = launch({"0": "done 4", "1": "done 4"}, "ok")
    assert run.finish() == 0, run.err
    assert re.search(r"step 3/4  reward \+0\.3000  kl 0\.01000  s/step 0\.10  tokens/s 50", run.out)
    assert "rlx: mean reward: +0.1500 over 4 steps" in run.out
    assert "4 steps" in run.out and "20 tokens" in run.out and run.err == ""
    [url] = urls_of(run)
    assert not is_listening(int(url.rpartition(":")[2]))
    assert "model:\n  path: nowhere" in (run.dir / "config.yaml").read_text()
    assert run.members() == []


def test_killed_rank_is_named_and_nothing_remains(launch) -> None:
    run = launch({"0": "done 999 grandchildren stubborn", "1": "done 999"}, "ok")
    run.wait_for_step(1)
    run.child("trainer", 1).kill()
    run.wait_until_gone(30, grandchild_ports(run), besides={run.process.pid})
    assert run.finish() == 1
    assert re.fullmatch(r'rlx: FAILED trainer rank 1 in phase "update policy" of step [1-9]\d*', run.last_lines[0])
    assert run.last_lines[1:] == ["rlx: cause: killed by signal 9 (SIGKILL)", f"rlx: logs: {run.dir}/logs/trainer-1.log"]
    assert run.members() == []


def test_exception_is_quoted_from_its_own_log(launch) -> None:
    run = launch({"0": "done 999", "1": "raise 1", "2": "done 999"})
    assert run.finish() == 1
    assert run.last_lines[:2] == [
        'rlx: FAILED trainer rank 1 in phase "update policy" of step 1',
        "rlx: cause: ValueError: odd 'shape' | second line",
    ]
    assert run.members() == []


def test_silent_exit_shows_the_log(launch) -> None:
    run = launch({"0": "exit 1"})
    assert run.finish() == 1
    assert run.last_lines[:2] == [
        'rlx: FAILED trainer rank 0 in phase "update policy" of step 1',
        "rlx: cause: exited with status 7",
    ]
    assert "trainer-0 PHASE step=1 update policy" in run.err


def test_engine_that_leaves_early(launch) -> None:
    run = launch({"0": "done 999"}, "exit 1.5")
    assert run.finish() == 1
    assert re.fullmatch(r'rlx: FAILED engine rank 0 in phase "update policy" of step \d+', run.last_lines[0])
    assert run.last_lines[1] == "rlx: cause: exited with status 0 before the training was done"


def test_an_engine_that_dies_is_started_again_until_its_restarts_are_used_up(launch) -> None:
    run = launch({"0": "done 999"}, "exit 1.0", "max_restarts=2")
    assert run.finish() == 1
    assert "rlx: FAILED engine rank 0" in run.last_lines[0]
    assert re.findall(r"engine 0 ended; restart (\d) of 2", run.out) == ["1", "2"]
    fleet = read_fleet(run.dir / "engines.json")
    assert [member.incarnation for member in fleet.members] == [2] and fleet.num_restarts == 2
    assert (run.dir / "engines.json").stat().st_mode & 0o777 == 0o600
    assert run.members() == []


def test_a_replacement_that_a_trainer_asks_for(launch) -> None:
    run = launch({"0": "done 40"}, "ok", "max_restarts=1")
    run.wait_for_step(1)
    path = run.dir / "engines.json"
    [before] = read_fleet(path).members
    request_replacement(run.dir, before, "it said so")
    deadline = time.monotonic() + 60
    while [member.incarnation for member in read_fleet(path).members] != [1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [after] = read_fleet(path).members
    assert is_listening(int(after.url.rpartition(":")[2])) and not is_listening(int(before.url.rpartition(":")[2]))
    assert run.finish() == 0, run.err
    assert "engine 0 answers wrongly or not at all: it said so; restart 1 of 1" in run.out


def test_an_engine_on_the_trainers_devices_waits_until_they_let_it_start(launch) -> None:
    """Held in its last life too, without being the run's failure; a life may start once."""
    run = launch({"0": "done 60"}, "ok", "max_restarts=2", "colocated=1")
    run.wait_for_step(1)
    path = run.dir / "engines.json"
    for life in (1, 2):
        run.child("engine", 0).kill()
        held = Held(index=0, incarnation=life)
        wait_for(lambda held=held: read_fleet(path).held == (held,))
        if life == 2:
            let_start(run.dir, Held(index=0, incarnation=1))
        time.sleep(1.0)
        assert read_fleet(path).members == () and read_fleet(path).held == (held,)
        assert [p for p in run.members() if "engine" in p.cmdline()] == [] and run.process.poll() is None
        let_start(run.dir, held)
        wait_for(lambda life=life: [member.incarnation for member in read_fleet(path).members] == [life])
        assert read_fleet(path).held == ()
    assert "engine 0 ended; restart 2 of 2 waits until the trainers have made room" in run.out
    assert run.finish() == 0, run.err
    assert run.members() == []


def test_a_held_engine_that_does_not_become_healthy_is_held_again(launch) -> None:
    run = launch({"0": "done 999"}, "once", "max_restarts=2", "colocated=1")
    run.wait_for_step(1)
    path = run.dir / "engines.json"
    run.child("engine", 0).kill()
    for life in (1, 2):
        wait_for(lambda life=life: read_fleet(path).held == (Held(index=0, incarnation=life),))
        let_start(run.dir, Held(index=0, incarnation=life))
    assert run.finish() == 1
    assert run.last_lines[0] == 'rlx: FAILED engine rank 0 in phase "start engine" before the first step'
    assert run.members() == []


@pytest.mark.parametrize("engine", ["silent", "unhealthy"])
def test_engine_never_healthy(launch, engine: str) -> None:
    run = launch({"0": "done 999"}, engine)
    assert run.finish() == 1
    assert run.last_lines[0] == 'rlx: FAILED engine rank 0 in phase "start engine" before the first step'
    assert re.search("reported no port within 2 s" if engine == "silent" else "not healthy within .* HTTP 503", run.last_lines[1])
    assert "loading dummy weights of 17 tensors" in run.err
    assert run.members() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_interrupt(launch, number: int, status: int) -> None:
    run = launch({"0": "done 999 grandchildren", "1": "done 999"}, "ok")
    run.wait_for_step(1)
    run.process.send_signal(number)
    run.wait_until_gone(30, grandchild_ports(run), besides={run.process.pid})
    assert run.finish() == status
    assert f"stopped 2 trainer rank(s) and 1 engine(s); run folder: {run.dir}" in run.last_lines[-1]
    assert run.members() == [] and not any(map(is_listening, grandchild_ports(run)))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_asked_to_save_the_driver_is_told_and_the_status_says_so(launch, number: int) -> None:
    run = launch({"0": "done 999", "1": "done 999"}, "ok")
    run.wait_for_step(1)
    run.process.send_signal(number)
    assert run.finish() == 75, run.err
    name = signal.Signals(number).name
    assert f"{name}: saving after this step" in run.out and f"{name} asked to save and leave" in run.out
    assert run.members() == [] and not list(run.dir.glob(".stop-*"))


def test_a_launcher_in_the_background_ignores_ctrl_c_and_heeds_sigterm(launch) -> None:
    """Shells start what they put in the background (``rlx train ... &`` in a script) with SIGINT ignored, and so it stays."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = launch({"0": "done 999", "1": "done 999"}, "ok")
    finally:
        signal.signal(signal.SIGINT, before)
    run.wait_for_step(1)
    run.process.send_signal(signal.SIGINT)
    run.wait_for_step(2)
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 75, run.err
    assert "SIGTERM asked to save and leave" in run.out and "SIGINT" not in run.out
    assert run.members() == []


def test_second_interrupt_kills_at_once(launch) -> None:
    """Timed at the trainer's end, not the launcher's: leaving an interpreter that holds torch takes seconds by itself."""
    run = launch({"0": "done 999 stubborn"})
    run.wait_for_step(1)
    trainer = run.child("trainer", 0)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    assert not has_ended(trainer)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    while not has_ended(trainer):
        assert time.monotonic() - began < 1.5  # the rest of the grace would be 2.4 s
        time.sleep(0.01)
    assert run.finish() == 130
    assert run.members() == []


@pytest.mark.parametrize("kind", ["", "deaf stubborn"])
def test_killed_launcher_leaves_nothing(launch, kind: str) -> None:
    """``deaf`` ranks do not watch the pipe: the guard ends them."""
    run = launch({"0": f"done 999 grandchildren {kind}", "1": f"done 999 {kind}"}, "ok")
    run.wait_for_step(1)
    [url] = urls_of(run)
    run.process.kill()
    run.wait_until_gone(30, [int(url.rpartition(":")[2]), *grandchild_ports(run)])
    assert re.fullmatch(
        rf'rlx: FAILED launcher \(pid {run.process.pid}\) died while the driver was in phase "update policy" of step \d+',
        run.last_lines[0],
    )
    assert "all its processes were ended" in run.last_lines[1]


def test_stopped_child_is_ended_too(launch) -> None:
    """A process under SIGSTOP does not act on SIGTERM."""
    run = launch({"0": "done 999", "1": "done 999"})
    run.wait_for_step(1)
    run.child("trainer", 0).suspend()
    run.child("trainer", 1).kill()
    run.wait_until_gone(30, [], besides={run.process.pid})
    assert run.finish() == 1
    assert run.last_lines[0].startswith('rlx: FAILED trainer rank 1 in phase "update policy" of step ')
    assert run.members() == []


def test_trainer_that_hangs_after_the_others_are_done(launch) -> None:
    run = launch({"0": "done 1", "1": "done 1", "2": "done 999"}, "none", "failure_timeout_s=10")
    # Ranks 0 and 1 leave; rank 2 sees rank 0 close its connection, which is only a consequence when nothing else failed.
    assert run.finish() == 1
    assert run.last_lines[0].startswith('rlx: FAILED trainer rank 2 in phase "update policy" of step')


@pytest.mark.parametrize(("times", "status"), [(2, 0), (3, 1)])
def test_taken_port_is_retried_twice(launch, times: int, status: int) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        run = launch({"0": "done 2"}, "ok", f"taken_port={stranger.getsockname()[1]}", f"times={times}")
        assert run.finish() == status, run.err
    assert run.out.count("port was taken by another program") == 2
    if status:
        assert "Address already in use" in run.last_lines[1]
