"""What the process pool is made of: the backlog, the channel, the stopwatch; and that nothing a judge does stops the clock."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.config.schema import RewardConfig
from rlx.rewards.pool.backlog import Backlog
from rlx.rewards.pool.channel import Channel
from rlx.rewards.pool.processes import ProcessPool
from rlx.rewards.pool.stopwatch import NOTHING, Stopwatch, shared_page
from rlx.types.rollout import Completion, Prompt, RolloutGroup


@given(st.lists(st.integers(0, 9), max_size=12), st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), max_size=60))
def test_the_backlog_deals_everything_once(sizes: list[int], turns: list[tuple[int, int]]) -> None:
    backlog, start = Backlog(), 0
    for size in sizes:
        backlog.add(range(start, start + size))
        start += size
    dealt = []
    for judge, num in turns:
        left = len(backlog)
        taken = backlog.take(judge, num)
        assert len(taken) == min(num, left) == left - len(backlog)
        dealt += taken
    backlog.leave(0)
    dealt += backlog.take(3, len(backlog))
    assert sorted(dealt) == list(range(start)) and not backlog


def test_a_judge_keeps_to_its_group_and_helps_out_at_the_end() -> None:
    backlog = Backlog()
    for start in (0, 10, 20):
        backlog.add(range(start, start + 4))
    assert [backlog.take(judge, 2) for judge in "abab"] == [[0, 1], [10, 11], [2, 3], [12, 13]]
    assert backlog.take("a", 1) == [20] and backlog.take("b", 1) == [21]
    backlog.add([7], first=True)
    assert backlog.take("b", 1) == [7]
    backlog.leave("a")
    assert backlog.take("b", 9) == [22, 23] and backlog.take("a", 1) == []


def pair() -> tuple[Channel, Channel]:
    return tuple(Channel(end) for end in socket.socketpair())  # type: ignore[return-value]


def test_messages_of_any_size_arrive_in_order() -> None:
    ours, theirs = pair()
    messages = [b"x" * size for size in (0, 1, 2**18 - 20, 2**18, 2**21, 3)]
    for message in messages:
        ours.post(message)
    assert ours.has_mail  # more than a socket holds, and nobody waited
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.extend(theirs.receive() for _ in messages))
    reader.start()
    while ours.has_mail:
        ours.flush()
    reader.join()
    assert found == messages
    sender = threading.Thread(target=lambda: [theirs.send(message) for message in messages])
    sender.start()
    back: list[bytes] = []
    while len(back) < len(messages):
        back += ours.collect()
    sender.join()
    assert back == messages and ours.collect() == []


def test_what_was_sent_before_the_end_still_arrives() -> None:
    ours, theirs = pair()
    theirs.send("last words")
    theirs.close()
    ours.post("to nobody")
    assert ours.collect() == ["last words"]
    with pytest.raises((EOFError, OSError)):
        ours.collect()
    ours, theirs = pair()
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()


def test_a_stopwatch_is_read_from_another_process() -> None:
    page = shared_page()
    stopwatch = Stopwatch(page)
    assert stopwatch.read()[0] == NOTHING
    before_s = time.monotonic()
    if os.fork() == 0:
        Stopwatch(page).start(2**62 + 1)
        os._exit(0)
    os.wait()
    number, since_s = stopwatch.read()
    assert number == 2**62 + 1 and before_s <= since_s <= time.monotonic()
    stopwatch.close()
    os.close(page)


def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def test_long_answers_behind_one_that_hangs_do_not_stop_the_clock() -> None:
    verifier = f"{Path(__file__).with_name('bad_verifier.py')}:judge"
    pool = ProcessPool(decode, RewardConfig(name=verifier, num_workers=1, timeout_s=1.0))
    quick = ["1"] * 40  # so that answers travel together
    texts = [*quick, "loop", *["2" + " " * 100_000] * 8, "sleep", "3"]
    answers = tuple(
        Completion(token_ids=tuple(map(ord, text)), rollout_logprobs=(), finish_reason="stop", weight_versions=())
        for text in texts
    )
    group = RolloutGroup(prompt=Prompt(prompt_id=0, token_ids=(1,), text="q", label="1"), completions=answers)
    (scored,) = pool.score([group])
    pool.close()
    values = [reward.value if reward.valid else None for reward in scored.rewards or ()]
    assert values == [1.0] * 40 + [None] + [2.0] * 8 + [None, 3.0]
    assert pool.num_timeouts == 2 and pool.num_deaths == 0


class Unpicklable:
    def __reduce__(self) -> str:
        raise TypeError("never leaves home")


def test_an_answer_that_cannot_travel_costs_itself_alone() -> None:
    pool = ProcessPool(decode, RewardConfig(name="exact", num_workers=1))
    one = Completion(token_ids=(49,), rollout_logprobs=(), finish_reason="stop", weight_versions=())
    groups = [
        RolloutGroup(
            prompt=Prompt(
                prompt_id=index, token_ids=(1,), text="q", label="1", extra={"row": Unpicklable()} if index == 60 else {}
            ),
            completions=(one,),
        )
        for index in range(100)
    ]
    rewards = [reward for scored in pool.score(groups) for reward in scored.rewards or ()]
    pool.close()
    assert [index for index, reward in enumerate(rewards) if not reward.valid] == [60]
    assert "cannot be handed to a process: TypeError: never leaves home" in (rewards[60].error or "")
