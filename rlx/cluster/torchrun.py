"""A run whose trainer ranks torchrun starts, on one node or many, from nothing but the configuration.

Rank 0 validates, makes the run folder (on a file system that all nodes see), tells the others where it is and starts the
driver. The first rank of each node also starts that node's engines and, in a thread of its own, looks after them; rank 0's
thread watches the driver, puts the list of engines together and shows the run's progress on the terminal. From there on a rank
works as under the local launcher. Whoever fails ends its engines and its process; torchrun then ends the others.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from torch._C._distributed_c10d import TCPStore

from rlx.cluster.driver import DriverProcess
from rlx.cluster.preflight import preflight
from rlx.cluster.progress import Progress
from rlx.config.load import ConfigError, dump_config, load_config
from rlx.config.parts import EngineSettings
from rlx.config.schema import Config, RunConfig
from rlx.engines.engine_plan import attached_fleet
from rlx.engines.fleet import write_fleet
from rlx.engines.node import Assembly, Node, NodeEngines
from rlx.obs.log import current_phase, log_failure, logger
from rlx.placement.from_config import check_spanning, seats_of
from rlx.placement.seats import PlacementError, Seats
from rlx.processes.causes import (
    Cause,
    shown_log,
    speaks_of_lost_peer,
    where,
)
from rlx.processes.environment import (
    RankEnvironment,
    Rendezvous,
    default_interface,
    rendezvous,
    report_cause,
)
from rlx.processes.heartbeat import Pulse
from rlx.processes.rundir import (
    ENDPOINTS,
    log_path,
    open_run_dir,
    wait_for_shared,
)
from rlx.processes.stopping import end_on_signals
from rlx.processes.supervisor import now_text

MEET_S = 300.0
END_KEY = "rlx/end"
_LOOK_S = 0.2
_TOLD_KEY, _TELL_S = "rlx/told", 60.0
_HOSTED_S, _DRIVER_S = 20.0, 3.0


@dataclass(slots=True, kw_only=True)
class JoinedRun:
    """What a rank needs to take part; ``done`` is for the rank to say: False when it was asked to save and leave."""

    run_dir: Path
    done: bool = True


@contextmanager
def join_run(
    config_path: str, overrides: Sequence[str], place: RankEnvironment, stop_asked: Callable[[], bool]
) -> Iterator[JoinedRun]:
    """Meet the other ranks, agree on the run, start this node's engines; inside, output goes to the rank's log.

    ConfigError on rank 0 when the configuration cannot be used, with nothing started; the other ranks then leave with
    SystemExit(2). Whatever fails inside ends this process (status 1) with its cause in the log and on the terminal.
    """
    meeting = rendezvous()
    store = meet(meeting, place.rank)
    with ExitStack() as stack:
        run_dir = _agree(store, config_path, overrides, (place, meeting), stack)
        config = load_config(str(run_dir / "config.yaml"), [])
        engines = EngineSettings.of(config)
        seats = seats_of(engines, config.parallel, place.world_size // meeting.ranks_per_node)
        nodes = range(seats.machines.nodes)
        pulse = Pulse(meet(meeting, place.rank), meeting.node, nodes, run=meeting.attempt, end=END_KEY)
        terminal = _to_log(log_path(run_dir, "trainer", place.rank))
        duty = _Duty(engines, config.run, run_dir, (place, meeting), terminal, pulse)
        joined = JoinedRun(run_dir=run_dir)
        try:
            default_interface(meeting.own_address())
            duty.begin(seats, stop_asked)
            yield joined
            duty.await_driver()
        except Exception as error:
            log_failure(error)
            duty.fail(f"{type(error).__name__}: {error}")
        except BaseException:
            duty.stop()
            raise
        if place.rank == 0:
            store.set(END_KEY, "end")
        duty.finish(None if joined.done else "asked to save and leave; run.resume=auto goes on")


def meet(meeting: Rendezvous, rank: int) -> TCPStore:
    """The store that all ranks share: the launcher's where it keeps one, else rank 0's."""
    # The launchers met at theirs before they started any rank: when it does not answer now, rank 0 has left.
    limit_s = _HOSTED_S if meeting.is_hosted and rank >= 0 else MEET_S
    try:
        store = TCPStore(
            meeting.address,
            meeting.port,
            is_master=rank == 0 and not meeting.is_hosted,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=limit_s),
        )
    except RuntimeError as error:
        at = f"{meeting.address}:{meeting.port} (MASTER_ADDR, MASTER_PORT)"
        raise ConnectionError(f"rank {rank} on {socket.gethostname()} did not reach rank 0 at {at}: {error}") from error
    store.set_timeout(timedelta(seconds=MEET_S))
    return store


def _agree(
    store: TCPStore, path: str, overrides: Sequence[str], where_: tuple[RankEnvironment, Rendezvous], stack: ExitStack
) -> Path:
    """The run folder. On rank 0: validated and made, and kept from other launchers until ``stack`` closes."""
    place, meeting = where_
    key = _run_key(meeting)
    if place.rank:
        return agreed_run(store, meeting)
    try:
        with at_work(store, meeting):
            config = preflight(_load(path, overrides, place))
        engines = EngineSettings.of(config)
        check_spanning(engines, seats_of(engines, config.parallel, place.world_size // meeting.ranks_per_node))
        run_dir = stack.enter_context(open_run_dir(config.run, evaluates=config.evaluation.only))
    except (ConfigError, PlacementError) as error:
        problems = list(error.problems) if isinstance(error, ConfigError) else [str(error)]
        store.set(key, json.dumps({"problems": problems}))
        _wait_until_told(store, place.world_size - 1)
        raise ConfigError(problems) from error
    (run_dir / "config.yaml").write_text(dump_config(config))
    store.set(key, json.dumps({"problems": [], "run_dir": str(run_dir)}))
    return run_dir


def agreed_run(store: TCPStore, meeting: Rendezvous) -> Path:
    """The run folder that rank 0 made, once it is done with models and data; SystemExit(2) when it refused the configuration."""
    key, beats = _run_key(meeting), 0
    while True:
        try:
            store.wait([key], timedelta(seconds=MEET_S))
            break
        except RuntimeError:
            seen, beats = beats, store.add(_beat_key(meeting), 0)
            if beats == seen:
                raise
    found = json.loads(store.get(key))
    if found["problems"]:
        store.add(_TOLD_KEY, 1)
        raise SystemExit(2)
    run_dir = Path(found["run_dir"])
    wait_for_shared(run_dir / "config.yaml")
    return run_dir


@contextmanager
def at_work(store: TCPStore, meeting: Rendezvous) -> Iterator[None]:
    """Rank 0 may download a model or read millions of rows in here: the others see it count, and wait on."""
    done = threading.Event()

    def count() -> None:
        while not done.wait(MEET_S / 10):
            store.add(_beat_key(meeting), 1)

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    try:
        yield
    finally:
        done.set()
        counting.join()


def _wait_until_told(store: TCPStore, num_ranks: int) -> None:
    """The store goes with this node's torchrun: leave once the others have read it, or have had the time to."""
    deadline = time.monotonic() + _TELL_S
    while store.add(_TOLD_KEY, 0) < num_ranks and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def _run_key(meeting: Rendezvous) -> str:
    return f"rlx/run/{meeting.attempt}"


def _beat_key(meeting: Rendezvous) -> str:
    return f"rlx/at-work/{meeting.attempt}"


def _load(path: str, overrides: Sequence[str], place: RankEnvironment) -> Config:
    """The configuration on as many ranks as torchrun started."""
    here = ["cluster.launcher=torchrun", f"cluster.num_trainer_ranks={place.world_size}"]
    config = load_config(path, [*overrides, *here])
    asked = load_config(path, overrides).cluster.num_trainer_ranks
    if asked not in (None, place.world_size):
        raise ConfigError(
            [
                f"cluster.num_trainer_ranks: {asked}, but torchrun started {place.world_size} rank(s)"
                " (--nnodes x --nproc-per-node); make them equal or leave the key out"
            ]
        )
    return config


def _to_log(path: Path) -> TextIO:
    """Send this process's output, children's included, to ``path``; returns the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return terminal


class _Duty(threading.Thread):
    """What a rank does beside training. One thread; it consumes the engines' states and the run folder, produces the
    list of engines and lines on the terminal, waits for nobody and stops when told."""

    def __init__(
        self,
        engines: EngineSettings,
        run: RunConfig,
        run_dir: Path,
        where_: tuple[RankEnvironment, Rendezvous],
        terminal: TextIO,
        pulse: Pulse,
    ) -> None:
        super().__init__(name="node-duty", daemon=True)
        self._place, self._meeting = where_
        self._settings, self._run, self._run_dir, self._terminal, self._pulse = engines, run, run_dir, terminal, pulse
        self._stopping = threading.Event()
        self._once = threading.Lock()
        self._engines: NodeEngines | None = None
        self._driver: DriverProcess | None = None
        self._ticks: list[Callable[[], None]] = [self._watch_agent, self._watch_hosts]
        self._agent = os.getppid()

    def begin(self, seats: Seats, stop_asked: Callable[[], bool]) -> None:
        """Start what this rank is to start, and the thread; ``stop_asked`` on rank 0 is handed on to the driver. SIGTERM and
        SIGINT now end the process whatever the main thread is in."""
        end_on_signals(self.end)
        node, own = self._meeting.node, self._settings.num_started
        if self._place.rank == 0:
            self._begin_rank_0(seats if own else None, stop_asked)
        parts = seats.parts_of(node) if own and self._place.local_rank == 0 else {}
        if parts:
            here = Node(number=node, address=self._meeting.own_address(), num_engines=len(parts))
            self._engines = NodeEngines(self._settings, self._run_dir, here, parts)
            self._ticks.append(self._tend_engines)
        if self._place.local_rank == 0:
            self._pulse.start()
        self.start()

    def _begin_rank_0(self, seats: Seats | None, stop_asked: Callable[[], bool]) -> None:
        if seats is None:
            write_fleet(self._run_dir / ENDPOINTS, attached_fleet(self._settings.rollout))
        else:
            self._ticks.append(Assembly(self._run_dir, seats.leading_nodes).tick)
        self._progress = Progress(self._run_dir, total_steps=self._run.steps, out=self._terminal)
        self._progress.say(f"{self._place.world_size} trainer rank(s) under torchrun; run folder: {self._run_dir}")
        self._ticks.append(self._progress.tick)
        self._driver = DriverProcess(self._run_dir, dict(os.environ), stop_asked)
        self._ticks.append(self._tend_driver)

    def await_driver(self) -> None:
        """On rank 0, once the ranks were let go: until the driver has ended well. RuntimeError with its cause else."""
        if self._driver is not None:
            cause = self._driver.ended(self._run.failure_timeout_s)
            if cause is not None:
                raise RuntimeError(cause.cause)

    def run(self) -> None:
        while not self._stopping.wait(_LOOK_S):
            try:
                for tick in self._ticks:
                    tick()
            except Exception as error:  # whatever it is, nobody else would notice
                log_failure(error)
                self.fail(f"{type(error).__name__}: {error}", self._run_dir / "logs")

    def finish(self, note: str | None) -> None:
        """The training is done, or left as ``note`` says: end the engines, say the last words."""
        self.stop()
        self._pulse.stop()
        if self._place.rank == 0:
            self._progress.close()
            print(f"rlx: {note}" if note else self._progress.summary(), file=self._terminal, flush=True)

    def stop(self) -> None:
        """End the thread and the engines."""
        self._stopping.set()
        self._pulse.is_over = True
        with self._once:
            if self._engines is not None:
                self._engines.stop()
                self._engines = None
            if self._driver is not None:
                self._driver.stop()

    def end(self, number: int) -> None:
        """Leave because of a signal; does not return."""
        logger.info("ended by %s", signal.Signals(number).name)
        self.stop()
        os._exit(128 + number)

    def fail(self, cause: str, log: Path | None = None) -> None:
        """Leave because this rank failed; does not return."""
        own = log_path(self._run_dir, "trainer", self._place.rank)
        blamed = self._cause_of("trainer", self._place.rank, cause, log or own)
        if speaks_of_lost_peer(cause) and self._driver is not None:
            blamed = self._driver.ended(_DRIVER_S) or blamed  # a driver that failed explains it
        self.leave(blamed, socket.gethostname())

    def leave(self, cause: Cause, host: str) -> None:
        """Leave because somebody failed; does not return. What only follows from another's failure is said in one line."""
        if cause.role in ("driver", "trainer") and speaks_of_lost_peer(cause.cause):
            lost = self._pulse.lost(0)
            text = cause.cause if lost is None else f"{lost}; {cause.cause}"
            lines = [f"rlx: {cause.role} rank {cause.rank} on {host} lost a peer: {text.splitlines()[0]}"]
        else:
            lines = [f"rlx: FAILED {cause.role} rank {cause.rank} on {host} {where(cause.phase)}", f"rlx: cause: {cause.cause}"]
            lines.append(f"rlx: logs: {cause.log_path}")
        print("\n".join(lines), file=self._terminal, flush=True)
        report_cause(lines)
        self.stop()
        # Peers may be inside a collective with us: leave without the orderly shutdown that would wait for them.
        os._exit(1)

    def _cause_of(self, role: str, rank: int, cause: str, log: Path) -> Cause:
        return Cause(role=role, rank=rank, phase=current_phase(), cause=cause, log_path=log, when=now_text())

    def _watch_agent(self) -> None:
        if os.getppid() != self._agent:
            self.fail(f"torchrun's own process (pid {self._agent}) died")

    def _watch_hosts(self) -> None:
        words = self._pulse.last_words
        if words is not None:
            log = self._run_dir / "logs" if words.log is None else Path(words.log)
            self.leave(self._cause_of(words.role, words.rank, words.cause, log), words.host)
        lost = self._pulse.lost(self._run.failure_timeout_s)
        if lost is not None:
            self.fail(str(lost))

    def _tend_driver(self) -> None:
        assert self._driver is not None
        self._driver.stop_file.hand_on()
        cause = self._driver.failure()
        if cause is not None:
            self._tell(cause, self._driver.child.log_text())

    def _tend_engines(self) -> None:
        with self._once:
            cause: Cause | None = None if self._engines is None else self._engines.tick()
            log = "" if self._engines is None or cause is None else self._engines.log_of(cause)
        if cause is not None:
            self._tell(cause, log)

    def _tell(self, cause: Cause, log: str) -> None:
        """Leave because of somebody that this rank started."""
        print(*shown_log(cause, log), sep="\n", file=self._terminal, flush=True)
        self.leave(cause, socket.gethostname())
