"""Which failure came first."""

import random
import signal
from pathlib import Path

import pytest

from rlx.obs.log import Phase
from rlx.processes.causes import (
    Ended,
    cause_of,
    describe,
    first_cause,
    is_port_taken,
    speaks_of_lost_peer,
)

CONSEQUENCES = [
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711",
    "RuntimeError: [gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]:1: Connection reset by peer",
    "DistBackendError: NCCL error: remote process exited or there was a network error",
    "EngineError: http://127.0.0.1:9: ConnectError: All connection attempts failed",
    "ServerDisconnectedError: Server disconnected",
    "DistNetworkError: failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation to complete",
    "BrokenPipeError: [Errno 32] Broken pipe",
    "LaneError: the connection to trainer rank 0 was lost: it ended",
    "RuntimeError: the connection to the driver was lost: it ended or was ended",
]
CAUSES = [
    "ValueError: loss is not finite",
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "FileNotFoundError: [Errno 2] No such file or directory: 'data.jsonl'",
    "DistNetworkError: The server socket has failed to listen on any local network address. EADDRINUSE address already in use",
    "SyncError: canary mismatch on engine 0: mean |log-prob| difference 0.3 > 0.001",
    "LaneError: trainer rank 1 showed no sign of life for 70 s: the process is stopped or hangs, or its host was lost",
]


def at(second: float) -> str:
    return f"2026-03-04T05:06:{second:06.3f}"


def ended(role: str, rank: int, *, returncode: int, seen: float, failed: tuple[float, str] | None = None, log: str = "") -> Ended:
    if failed is not None:
        log += f'{at(failed[0])} {role}-{rank} FAILED step=3 phase="update policy" cause="{failed[1]}"\n'
    return Ended(
        role=role,
        rank=rank,
        returncode=returncode,
        seen_alive=at(seen - 0.2),
        seen_ended=at(seen),
        log=log,
        log_path=Path(f"logs/{role}-{rank}.log"),
        phase=Phase(step=3, name="roll out"),
    )


def blamed(children: list[Ended]) -> tuple[str, int]:
    shuffled = random.sample(children, len(children))
    cause = first_cause([cause_of(child) for child in shuffled])
    return cause.role, cause.rank


@pytest.mark.parametrize("text", CONSEQUENCES)
def test_lost_peer_is_recognised(text: str) -> None:
    assert speaks_of_lost_peer(text)


@pytest.mark.parametrize("text", CAUSES)
def test_real_cause_is_not_a_consequence(text: str) -> None:
    assert not speaks_of_lost_peer(text)


@pytest.mark.parametrize("text", CONSEQUENCES)
def test_killed_rank_wins_over_ranks_that_lost_it(text: str) -> None:
    """Even when those wrote their lines before anyone saw the kill."""
    killed = ended("trainer", 2, returncode=-9, seen=20.2)
    others = [ended("trainer", rank, returncode=1, seen=20.2, failed=(20.001 + rank / 1000, text)) for rank in (0, 1, 3)]
    assert blamed([killed, *others]) == ("trainer", 2)


@pytest.mark.parametrize("text", CAUSES)
def test_raising_rank_wins_over_later_kill_and_crash(text: str) -> None:
    raising = ended("trainer", 1, returncode=1, seen=12.0, failed=(11.3, text))
    aborted = ended("trainer", 0, returncode=-6, seen=12.0, failed=(11.4, CONSEQUENCES[0]))
    killed = ended("engine", 0, returncode=-9, seen=14.0)
    assert blamed([raising, aborted, killed]) == ("trainer", 1)


def test_killed_engine_wins_over_driver_that_could_not_reach_it() -> None:
    engine = ended("engine", 1, returncode=-signal.SIGKILL, seen=30.4)
    driver = ended("trainer", 0, returncode=1, seen=30.4, failed=(30.25, CONSEQUENCES[3]))
    cause = first_cause([cause_of(driver), cause_of(engine)])
    assert (cause.role, cause.rank, cause.cause) == ("engine", 1, "killed by signal 9 (SIGKILL)")
    assert cause.phase == Phase(step=3, name="roll out")


def test_abort_without_a_word_loses_to_a_word() -> None:
    """A watchdog that aborts its process reacts to what happened elsewhere."""
    watchdog = ended("trainer", 0, returncode=-signal.SIGABRT, seen=9.0, log="terminate called: remote process exited\n")
    raising = ended("trainer", 3, returncode=1, seen=9.0, failed=(8.95, CAUSES[0]))
    assert blamed([watchdog, raising]) == ("trainer", 3)


def test_only_consequences_names_the_earliest() -> None:
    children = [ended("trainer", rank, returncode=1, seen=5.0, failed=(4.0 - rank / 10, CONSEQUENCES[4])) for rank in range(3)]
    assert blamed(children) == ("trainer", 2)


def test_silent_exit_status_and_engine_that_left() -> None:
    assert cause_of(ended("trainer", 0, returncode=7, seen=1.0)).cause == "exited with status 7"
    assert describe(0) == "exited with status 0 before the training was done"
    assert describe(-11) == "killed by signal 11 (SIGSEGV)"


def test_port_taken_is_found_in_a_traceback() -> None:
    assert is_port_taken(CAUSES[3] + "\n" * 60)
    assert is_port_taken("Port is already in use. dist_init_port=40001 port_base=40002")  # SGLang's
    assert not is_port_taken("\n".join(CAUSES[:3]))
