"""Judging in processes: whatever a verifier does costs its own sample alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from rlx.config.schema import RewardConfig
from rlx.rewards.pool.processes import ProcessPool
from rlx.rewards.pool.service import AllVerdictsInvalidError
from rlx.types.rollout import Prompt, RolloutGroup
from tests.trajectories import text_group

VERIFIER = f"{Path(__file__).with_name('bad_verifier.py')}:judge"
LIMIT_S = 1.0


def groups_of(*rows: Sequence[str]) -> list[RolloutGroup]:
    """Answers travel as the token ids of their characters."""
    prompts = [Prompt(prompt_id=index, token_ids=(1,), text="q", label="1") for index in range(len(rows))]
    return [text_group(prompt, *row) for prompt, row in zip(prompts, rows, strict=True)]


def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    config = RewardConfig(name=VERIFIER, num_workers=2, timeout_s=LIMIT_S, memory_mb=64)
    pool = ProcessPool(decode, config)
    yield pool
    below = psutil.Process().children(recursive=True)
    pool.close()
    assert not [process for process in below if process.is_running() and "fork_server" in " ".join(process.cmdline())]


def verdicts(pool: ProcessPool, *rows: Sequence[str]) -> list[list[float | str]]:
    scored = pool.score(groups_of(*rows))
    return [[r.value if r.valid else (r.error or "") for r in group.rewards or ()] for group in scored]


def test_verdicts_stand_beside_their_answers(pool: ProcessPool) -> None:
    rows = [[f"{row}.{column}" for column in range(1, row % 5 + 1)] for row in range(30)]
    assert verdicts(pool, *rows) == [[float(text) for text in row] for row in rows]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("loop", "no verdict within reward.timeout_s = 1 s"),
        ("sleep", "no verdict within"),
        ("fork", "no verdict within"),
        ("allocate", "MemoryError"),
        ("crash", "process died"),
        ("exit", "process died"),
        ("nonsense", "process died"),
        ("raise", "KeyError: 'no such thing'"),
        ("nan", "not a finite number"),
        ("-inf", "not a finite number"),
        ("word", "ValueError"),
    ],
)
def test_misbehaviour_costs_its_own_sample_alone(pool: ProcessPool, answer: str, message: str) -> None:
    before = (pool.num_timeouts, pool.num_deaths)
    (found,) = verdicts(pool, ["0.5", "1", answer, "2", "3", "4", "5"])
    assert message in str(found.pop(2))
    assert found == [0.5, 1.0, 2.0, 3.0, 4.0, 5.0]
    counted = (pool.num_timeouts - before[0], pool.num_deaths - before[1])
    assert counted == (int("within" in message), int("died" in message))


def test_nothing_that_a_verifier_started_stays(pool: ProcessPool) -> None:
    # The last ones are judged after the time limit of the first, so that both judges live at the end.
    verdicts(pool, ["fork", "leave", "leave", *["pause"] * 10])
    server = psutil.Process(pool._fork_server.pid)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = [process for process in server.children(recursive=True) if process.status() != "zombie"]
        if len(left) == 2 and all(process.ppid() == server.pid for process in left):
            return
        time.sleep(0.05)
    raise AssertionError(left)


def test_a_changed_directory_is_changed_back(pool: ProcessPool) -> None:
    assert verdicts(pool, ["wander", "where"] * 6) == [[0.5, 1.0] * 6]


def test_hanging_answers_take_the_sum_of_their_limits_over_the_workers(pool: ProcessPool) -> None:
    start_s = time.monotonic()
    rows = [["loop" if column == row % 8 and row < 6 else "1" for column in range(8)] for row in range(20)]
    found = verdicts(pool, *rows)
    assert sum(value == 1.0 for row in found for value in row) == 154
    assert time.monotonic() - start_s < 1.5 * 6 * LIMIT_S / 2 + 1


def test_a_batch_without_any_valid_verdict_is_an_error(pool: ProcessPool) -> None:
    with pytest.raises(AllVerdictsInvalidError, match="no such thing"):
        verdicts(pool, ["raise", "raise"])


def test_a_decoder_that_fails_is_counted_like_a_verifier() -> None:
    def refuse(token_ids: Sequence[int]) -> str:
        if len(token_ids) == 3:
            raise OverflowError("odd ids")
        return decode(token_ids)

    pool = ProcessPool(refuse, RewardConfig(name=VERIFIER, num_workers=1))
    assert verdicts(pool, ["1", "1.5"]) == [[1.0, "OverflowError: odd ids"]]
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(pool.score(groups_of(["1"])))


def test_a_judge_that_dies_at_rest_costs_nothing() -> None:
    pool = ProcessPool(decode, RewardConfig(name=VERIFIER, num_workers=1))
    assert verdicts(pool, ["1"]) == [[1.0]]
    (judge,) = psutil.Process(pool._fork_server.pid).children()
    judge.kill()
    judge.wait(10)
    assert verdicts(pool, ["1", "2"]) == [[1.0, 2.0]]
    assert (pool.num_deaths, pool.num_timeouts) == (1, 0)
    pool.close()


def test_a_judge_that_never_reads_is_replaced() -> None:
    """As by a thread that a verifier left behind and that keeps the interpreter to itself."""
    pool = ProcessPool(decode, RewardConfig(name=VERIFIER, num_workers=1, timeout_s=LIMIT_S))
    assert verdicts(pool, ["1"]) == [[1.0]]
    (judge,) = psutil.Process(pool._fork_server.pid).children()
    judge.suspend()
    ((first, second),) = verdicts(pool, ["2" + " " * 10**6, "3"])
    assert "no verdict within" in str(first) and second == 3.0
    pool.close()


def test_closing_ends_what_is_at_work() -> None:
    pool = ProcessPool(decode, RewardConfig(name=VERIFIER, num_workers=2, timeout_s=60.0))
    scoring = pool.score(groups_of(["1"], ["sleep", "fork", "1", "1"]))
    assert next(scoring).prompt.prompt_id == 0
    server = psutil.Process(pool._fork_server.pid)
    deadline = time.monotonic() + 10
    while len(below := server.children(recursive=True)) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(below) == 5  # two judges, and three that one verifier forked
    pool.close()
    _, alive = psutil.wait_procs([server, *below], timeout=5)
    assert not alive


def test_a_verifier_that_cannot_be_made_in_the_process_makes_verdicts_invalid(tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.py"
    file.write_text("raise OSError('no such place')")
    pool = ProcessPool(decode, RewardConfig(name=f"{file}:judge", num_workers=2))
    with pytest.raises(AllVerdictsInvalidError, match="the reward processes cannot go on"):
        verdicts(pool, ["1", "2", "3"])
    pool.close()
