"""Judging answers in processes that can be killed.

Who waits for whom: the feeder thread of ``ScoringService`` decodes answers and puts them in a queue; one dispatcher thread
hands them to the judges, takes their verdicts, and reads the clock. It never waits for a judge: what one does not read stays
in its ``Channel``. Quick answers travel several in a message, slow ones alone; a judge notes on a ``Stopwatch`` which one it
is at. One that runs out of time is killed with all it started; a judge that dies (crash, memory) is noticed at once. Both cost
their own sample alone: it is invalid and counted, what else that judge held goes to the others. The dispatcher ends when the
service is closed.
"""

from __future__ import annotations

import os
import queue
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rlx.config.schema import RewardConfig
from rlx.obs.log import logger
from rlx.rewards.base import invalid
from rlx.rewards.pool.backlog import Backlog
from rlx.rewards.pool.channel import Channel, Verdicts
from rlx.rewards.pool.process_tree import kill_tree
from rlx.rewards.pool.service import ScoringService, Verdict
from rlx.rewards.pool.stopwatch import NOTHING, Stopwatch, shared_page
from rlx.types.rollout import Reward

# A message holds answers for about so long, so that its cost is small beside theirs.
MESSAGE_S = 0.005
MAX_ANSWERS = 32
# How much the latest message counts in the estimate of an answer's time.
NEWEST_SHARE = 0.25


@dataclass(slots=True, eq=False)
class _Judge:
    """One process: the messages it holds (answers by number, oldest first), and when it was last heard or sent to."""

    pid: int
    channel: Channel
    stopwatch: Stopwatch
    held: deque[deque[int]] = field(default_factory=deque)
    since_s: float = 0.0

    def begun(self) -> tuple[int, float]:
        """The answer it is at and since when; while it is at none, the one it should be at since it last gave a sign."""
        number, since_s = self.stopwatch.read()
        return (self.held[0][0], max(since_s, self.since_s)) if number == NOTHING else (number, since_s)


class ProcessPool(ScoringService):
    """Judges with ``config.num_workers`` processes. ``num_deaths`` counts those that ended by themselves."""

    def __init__(self, decode: Callable[[Sequence[int]], str], config: RewardConfig) -> None:
        super().__init__(decode, config)
        self.num_deaths = 0
        self._num_workers = config.num_workers
        self._control, theirs = socket.socketpair()
        # The children's messages must not mix with this program's own; only stderr is shared.
        command = [sys.executable, "-m", "rlx.rewards.pool.fork_server", str(theirs.fileno())]
        self._zygote = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        theirs.close()
        self._births = Channel(self._control)
        self._births.send(config)
        self._incoming: queue.SimpleQueue[list[tuple[Verdict, str]]] = queue.SimpleQueue()
        self._wake_reading, self._wake_writing = os.pipe()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_reading, selectors.EVENT_READ)
        self._judges: list[_Judge] = []
        self._open: dict[int, tuple[Verdict, str]] = {}
        self._waiting = Backlog()
        # How long an answer takes, as of late.
        self._answer_s = MESSAGE_S
        self._thread = threading.Thread(target=self._dispatch, name="reward-dispatcher", daemon=True)
        self._thread.start()

    def submit(self, verdicts: Sequence[Verdict]) -> None:
        group = []
        for verdict in verdicts:
            try:
                group.append((verdict, self._decode(verdict.completion.token_ids)))
            except Exception as error:
                # A tokenizer may refuse ids in any way; that says nothing about the other answers.
                verdict.settle(invalid(f"{type(error).__name__}: {error}"))
        self._incoming.put(group)
        os.write(self._wake_writing, b"x")

    def close(self) -> None:
        """End the dispatcher, the judges and the process they were forked from."""
        if self._closed:
            return
        self._closed = True
        os.write(self._wake_writing, b"x")
        self._thread.join()
        for judge in self._judges:
            self._end(judge)
        self._selector.close()
        self._births.close()
        self._zygote.kill()
        self._zygote.wait()
        for descriptor in (self._wake_reading, self._wake_writing):
            os.close(descriptor)

    def _dispatch(self) -> None:
        try:
            for _ in range(self._num_workers):
                self._judges.append(self._start_judge())
            while not self._closed:
                self._hand_out()
                for key, events in self._selector.select(self._next_limit_s()):
                    if key.data is None:
                        os.read(self._wake_reading, 65536)
                        self._take_in()
                        continue
                    if events & selectors.EVENT_WRITE:
                        self._write(key.data)
                    if events & selectors.EVENT_READ:
                        self._receive(key.data)
                self._end_overdue()
        except Exception as error:
            # Whatever it is, nobody else would settle what is open: without this the trainer waits for ever.
            logger.exception("the reward processes cannot go on")
            self._fail(f"the reward processes cannot go on: {type(error).__name__}: {error}")

    def _take_in(self) -> None:
        while not self._incoming.empty():
            # 0 is the stopwatch's NOTHING, and no object's id.
            group = {id(verdict): (verdict, text) for verdict, text in self._incoming.get()}
            self._open |= group
            self._waiting.add(group)

    def _hand_out(self) -> None:
        """A message each before a second one; a second one only where waiting for it would cost more than sending it early."""
        for depth in range(2 if self._answer_s < MESSAGE_S else 1):
            for judge in self._judges:
                if self._waiting and len(judge.held) == depth:
                    share = -(-len(self._waiting) // len(self._judges))
                    num = min(share, MAX_ANSWERS, max(1, int(MESSAGE_S / self._answer_s)))
                    self._send(judge, self._waiting.take(judge, num))

    def _send(self, judge: _Judge, numbers: Sequence[int]) -> None:
        answers = []
        for number in numbers:
            verdict, text = self._open[number]
            # Log-probs are no business of a verifier, and the longest part of the message.
            completion = replace(verdict.completion, rollout_logprobs=(), weight_versions=())
            answers.append((number, verdict.prompt, text, completion))
        try:
            judge.channel.post(answers)
        except Exception as error:
            # A row's column may hold what cannot be pickled; with others in the message, it is found by sending them alone.
            if len(numbers) == 1:
                text = f"the answer cannot be handed to a process: {type(error).__name__}: {error}"
                self._settle(numbers[0], invalid(text))
            for number in numbers if len(numbers) > 1 else ():
                self._send(judge, [number])
            return
        if not judge.held:
            judge.since_s = time.monotonic()
        judge.held.append(deque(numbers))
        self._write(judge)

    def _write(self, judge: _Judge) -> None:
        judge.channel.flush()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if judge.channel.has_mail else 0)
        if self._selector.get_key(judge.channel).events != events:
            self._selector.modify(judge.channel, events, judge)

    def _receive(self, judge: _Judge) -> bool:
        """Settle what ``judge`` has found; False if it was dead and another took its place."""
        try:
            for message in judge.channel.collect():
                self._note(judge, message)
        except (EOFError, OSError):
            self.num_deaths += 1
            self._replace(judge, "the verifier's process died (crash, exit or out of memory)")
            return False
        return True

    def _note(self, judge: _Judge, found: Verdicts) -> None:
        for number, reward in found.rewards:
            judge.held[0].remove(number)
            self._settle(number, reward)
        if not judge.held[0]:
            judge.held.popleft()
        judge.since_s = time.monotonic()
        self._answer_s += NEWEST_SHARE * (found.seconds / len(found.rewards) - self._answer_s)

    def _next_limit_s(self) -> float | None:
        limits = [judge.begun()[1] + self._timeout_s for judge in self._judges if judge.held]
        return max(0.0, min(limits) - time.monotonic()) if limits else None

    def _end_overdue(self) -> None:
        for judge in list(self._judges):
            # Verdicts may have come while the others were looked after.
            if self._is_overdue(judge) and self._receive(judge) and self._is_overdue(judge):
                self.num_timeouts += 1
                self._replace(judge, f"no verdict within reward.timeout_s = {self._timeout_s:g} s")

    def _is_overdue(self, judge: _Judge) -> bool:
        return bool(judge.held) and time.monotonic() - judge.begun()[1] >= self._timeout_s

    def _replace(self, judge: _Judge, error: str) -> None:
        """End ``judge``; the answer it was at is invalid, what else it held goes first to the next judges."""
        self._selector.unregister(judge.channel)
        culprit = judge.begun()[0] if judge.held else NOTHING
        self._end(judge)
        others = [number for message in judge.held for number in message if number != culprit]
        if culprit in self._open:
            self._settle(culprit, invalid(error))
        self._waiting.leave(judge)
        self._waiting.add(others, first=True)
        self._judges[self._judges.index(judge)] = self._start_judge()

    def _end(self, judge: _Judge) -> None:
        kill_tree(judge.pid)
        judge.channel.close()
        judge.stopwatch.close()

    def _start_judge(self) -> _Judge:
        ours, theirs = socket.socketpair()
        page = shared_page()
        socket.send_fds(self._control, [b"f"], [theirs.fileno(), page])
        theirs.close()
        judge = _Judge(pid=self._births.receive(), channel=Channel(ours), stopwatch=Stopwatch(page))
        os.close(page)
        self._selector.register(judge.channel, selectors.EVENT_READ, judge)
        return judge

    def _settle(self, number: int, reward: Reward) -> None:
        verdict, _ = self._open.pop(number)
        verdict.settle(reward)

    def _fail(self, error: str) -> None:
        while not self._closed:
            self._take_in()
            for number in list(self._open):
                self._settle(number, invalid(error))
            os.read(self._wake_reading, 65536)
