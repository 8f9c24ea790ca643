"""The pool: order, overlap, time limits, and what a failing verifier turns into."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from rlx.config.schema import RewardConfig
from rlx.rewards.pool.service import AllVerdictsInvalidError, RewardPool
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward, RolloutGroup
from tests.trajectories import answered


def decode(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


def group(prompt_id: int, *answers: int) -> RolloutGroup:
    trajectories = tuple(answered((1,), (answer,)) for answer in answers)
    return RolloutGroup(prompt=Prompt(prompt_id=prompt_id, token_ids=(1,), text=""), trajectories=trajectories)


@pytest.fixture
def make_pool() -> Iterator[Callable[..., RewardPool]]:
    pools: list[RewardPool] = []

    def make(judge: Callable[[int, str], float], num_workers: int = 2, timeout_s: float = 20.0) -> RewardPool:
        def verifier(request: RewardRequest) -> Reward:
            return Reward(value=judge(request.prompt.prompt_id, request.response))

        pools.append(RewardPool(verifier, decode, RewardConfig(name="exact", num_workers=num_workers, timeout_s=timeout_s)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def values(groups: Iterator[RolloutGroup]) -> list[list[float | None]]:
    return [[reward.value if reward.valid else None for reward in group.rewards or ()] for group in groups]


def test_rewards_stand_beside_their_answers(make_pool: Callable[..., RewardPool]) -> None:
    def judge(prompt_id: int, text: str) -> float:
        time.sleep(0.002 * (int(text) % 3))
        return prompt_id + int(text) / 100

    groups = [group(index, *range(index % 5)) for index in range(20)]
    scored = list(make_pool(judge, num_workers=4).score(groups))
    assert [found.prompt.prompt_id for found in scored] == list(range(20))
    assert values(iter(scored)) == [[index + answer / 100 for answer in range(index % 5)] for index in range(20)]
    assert list(make_pool(judge).score([])) == []


def test_verdicts_are_made_while_groups_still_come_in(make_pool: Callable[..., RewardPool]) -> None:
    judged = threading.Event()

    def judge(prompt_id: int, text: str) -> float:
        judged.set()
        return 1.0

    def incoming() -> Iterator[RolloutGroup]:
        yield group(0, 1)
        assert judged.wait(10), "the first group was not judged before the second came"
        yield group(1, 1)

    assert values(make_pool(judge).score(incoming())) == [[1.0], [1.0]]


def test_a_failing_verifier_makes_samples_invalid(make_pool: Callable[..., RewardPool]) -> None:
    def judge(prompt_id: int, text: str) -> float:
        return {"0": 0.5, "1": math.nan, "2": math.inf, "3": "0.5", "5": 1e300, "6": -2e6}[text]  # type: ignore[return-value]

    (scored,) = make_pool(judge).score([group(0, 0, 1, 2, 3, 4, 5, 6)])
    assert [reward.valid for reward in scored.rewards or ()] == [True, *[False] * 6]
    errors = [reward.error or "" for reward in scored.rewards or ()]
    assert "nan" in errors[1] and "inf" in errors[2] and "'0.5'" in errors[3] and errors[4] == "KeyError: '4'"
    assert "reward is 1e+300, beyond reward.max_abs = 1e+06" in errors[5] and "-2e+06" in errors[6]


def test_a_batch_without_any_valid_verdict_is_an_error(make_pool: Callable[..., RewardPool]) -> None:
    def judge(prompt_id: int, text: str) -> float:
        raise OSError(f"no database for {prompt_id}")

    with pytest.raises(AllVerdictsInvalidError, match=r"all 3 verdicts.*OSError: no database for 0"):
        list(make_pool(judge).score([group(0, 1), group(1, 1, 2)]))


def test_a_hanging_verdict_times_out_and_holds_nobody_up(make_pool: Callable[..., RewardPool]) -> None:
    release = threading.Event()

    def judge(prompt_id: int, text: str) -> float:
        if text == "13":
            release.wait(30)
        return 1.0

    pool = make_pool(judge, num_workers=1, timeout_s=0.2)
    start_s = time.monotonic()
    found = values(pool.score([group(0, 1, 13, 2), group(1, 13, 3)]))
    assert found == [[1.0, None, 1.0], [None, 1.0]]
    assert pool.num_timeouts == 2 and time.monotonic() - start_s < 10
    release.set()
    assert values(pool.score([group(2, 4)])) == [[1.0]]


def test_a_caller_that_stops_early_leaves_the_pool_usable(make_pool: Callable[..., RewardPool]) -> None:
    release = threading.Event()

    def judge(prompt_id: int, text: str) -> float:
        if text == "13":
            release.wait(30)
        return float(text)

    pool = make_pool(judge, num_workers=1, timeout_s=0.3)
    scoring = pool.score([group(0, 1), group(1, 13)])
    assert next(scoring).prompt.prompt_id == 0
    scoring.close()  # type: ignore[attr-defined]
    assert values(pool.score([group(2, 5)])) == [[5.0]]
    release.set()


def test_errors_of_the_incoming_groups_reach_the_caller(make_pool: Callable[..., RewardPool]) -> None:
    def incoming() -> Iterator[RolloutGroup]:
        yield group(0, 1)
        raise ConnectionError("engine 2 is gone")

    with pytest.raises(ConnectionError, match="engine 2 is gone"):
        list(make_pool(lambda prompt_id, text: 1.0).score(incoming()))


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    pool = RewardPool(lambda *_: Reward(value=1.0), decode, RewardConfig(name="exact", num_workers=3))
    mine = set(threading.enumerate()) - before
    assert len(mine) == 3
    assert values(pool.score([group(0, 1)])) == [[1.0]]
    pool.close()
    for thread in mine:
        thread.join(10)
    assert not any(thread.is_alive() for thread in mine)
    with pytest.raises(RuntimeError, match="closed"):
        list(pool.score([group(0, 1)]))
