"""How answers reach the processes that judge them, and that nothing there stops the clock."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlx.config.schema import RewardConfig
from rlx.rewards.pool.channel import Channel, frame
from rlx.rewards.pool.processes import ProcessPool
from rlx.types.rollout import Prompt, RolloutGroup
from tests.trajectories import answered, text_group


def pair(timeout_s: float | None = None) -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair()
    return Channel(ours, timeout_s), Channel(theirs)


def test_messages_of_any_size_arrive_in_order() -> None:
    ours, theirs = pair()
    messages = [b"x" * size for size in (0, 1, 2**18 - 20, 2**18, 2**21, 3)]

    def echo() -> None:
        for _ in messages:
            theirs.send(theirs.receive())

    other = threading.Thread(target=echo)
    other.start()
    for message in messages:
        ours.send(message)
        assert ours.receive() == message
    other.join()


def test_what_was_sent_before_the_end_still_arrives() -> None:
    ours, theirs = pair()
    assert ours.is_open
    theirs.send("last words")
    theirs.close()
    assert ours.receive() == "last words"
    assert not ours.is_open
    with pytest.raises(EOFError):
        ours.receive()
    with pytest.raises(OSError, match="Broken pipe"):
        ours.send("to nobody")


def test_no_end_waits_longer_than_it_wants_to() -> None:
    ours, theirs = pair(timeout_s=0.05)
    with pytest.raises(TimeoutError):
        ours.receive()
    with pytest.raises(TimeoutError):
        ours.write(b"x" * 2**24)  # more than a socket holds, and nobody reads
    ours, theirs = pair(timeout_s=0.05)
    theirs.write(frame("more to come")[:-1])
    with pytest.raises(TimeoutError):
        ours.receive()


def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def test_long_answers_behind_one_that_hangs_do_not_stop_the_clock() -> None:
    verifier = f"{Path(__file__).with_name('bad_verifier.py')}:judge"
    pool = ProcessPool(decode, RewardConfig(name=verifier, num_workers=1, timeout_s=1.0))
    quick = ["1"] * 40
    texts = [*quick, "loop", *["2" + " " * 100_000] * 8, "sleep", "3"]
    group = text_group(Prompt(prompt_id=0, token_ids=(1,), text="q", label="1"), *texts)
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
    one = answered((1,), (49,))
    groups = [
        RolloutGroup(
            prompt=Prompt(
                prompt_id=index, token_ids=(1,), text="q", label="1", extra={"row": Unpicklable()} if index == 60 else {}
            ),
            trajectories=(one,),
        )
        for index in range(100)
    ]
    rewards = [reward for scored in pool.score(groups) for reward in scored.rewards or ()]
    pool.close()
    assert [index for index, reward in enumerate(rewards) if not reward.valid] == [60]
    assert "cannot be handed to a process: TypeError: never leaves home" in (rewards[60].error or "")
