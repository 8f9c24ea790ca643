"""Judging answers in processes that can be killed.

Who waits for whom: the feeder thread of ``ScoringService`` decodes answers and puts them in a queue; one dispatcher thread
hands them to the judges (a few ahead each, so that none waits for a message), takes their verdicts, and reads the clock. A
judge whose verifier runs out of time is killed with all it started; one that dies (crash, memory) is noticed at once. Both
cost their own sample alone: it is invalid and counted, answers sent ahead go to the next judge. The dispatcher ends when
the service is closed.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait

from rlx.config.schema import RewardConfig
from rlx.rewards.base import invalid
from rlx.rewards.process_tree import kill_tree
from rlx.rewards.service import ScoringService, Verdict
from rlx.types import Reward

# Answers handed to a judge beyond the one it is at.
AHEAD = 4


@dataclass(slots=True, eq=False)
class _Judge:
    """One process: answers it holds, oldest first, and since when it is at the first of them."""

    pid: int
    connection: Connection
    held: deque[int] = field(default_factory=deque)
    since_s: float = 0.0


class ProcessPool(ScoringService):
    """Judges with ``config.num_workers`` processes. ``num_deaths`` counts those that ended by themselves."""

    def __init__(self, decode: Callable[[Sequence[int]], str], config: RewardConfig) -> None:
        super().__init__(decode, config)
        self.num_deaths = 0
        self._num_workers = config.num_workers
        self._control, theirs = socket.socketpair()
        # The children's messages must not mix with this program's own; only stderr is shared.
        command = [sys.executable, "-m", "rlx.rewards.zygote", str(theirs.fileno())]
        self._zygote = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        theirs.close()
        self._answers = Connection(os.dup(self._control.fileno()))
        self._answers.send(config)
        self._incoming: queue.SimpleQueue[tuple[Verdict, str]] = queue.SimpleQueue()
        self._wake_reading, self._wake_writing = os.pipe()
        self._judges: list[_Judge] = []
        self._open: dict[int, tuple[Verdict, str]] = {}
        self._waiting: deque[int] = deque()
        self._thread = threading.Thread(target=self._dispatch, name="reward-dispatcher", daemon=True)
        self._thread.start()

    def submit(self, verdict: Verdict) -> None:
        try:
            text = self._decode(verdict.completion.token_ids)
        except Exception as error:
            # A tokenizer may refuse ids in any way; that says nothing about the other answers.
            verdict.settle(invalid(f"{type(error).__name__}: {error}"))
            return
        self._incoming.put((verdict, text))
        os.write(self._wake_writing, b"x")

    def close(self) -> None:
        """End the dispatcher, the judges and the process they were forked from."""
        if self._closed:
            return
        self._closed = True
        os.write(self._wake_writing, b"x")
        self._thread.join()
        for judge in self._judges:
            kill_tree(judge.pid)
            judge.connection.close()
        self._answers.close()
        self._control.close()
        self._zygote.kill()
        self._zygote.wait()
        for descriptor in (self._wake_reading, self._wake_writing):
            os.close(descriptor)

    def _dispatch(self) -> None:
        try:
            self._judges = [self._start_judge() for _ in range(self._num_workers)]
            while not self._closed:
                self._hand_out()
                ready = wait([self._wake_reading, *(judge.connection for judge in self._judges)], self._next_limit_s())
                if self._wake_reading in ready:
                    os.read(self._wake_reading, 65536)
                    self._take_in()
                for judge in list(self._judges):
                    if judge.connection in ready:
                        self._receive(judge)
                self._end_overdue()
        except (OSError, EOFError) as error:
            # Nobody else would settle what is open: without this the trainer waits for ever.
            self._fail(f"the reward processes cannot be started: {type(error).__name__}: {error}")

    def _take_in(self) -> None:
        while not self._incoming.empty():
            verdict, text = self._incoming.get()
            number = id(verdict)
            self._open[number] = (verdict, text)
            self._waiting.append(number)

    def _hand_out(self) -> None:
        """Level by level, so that no judge gets a second answer before each has a first."""
        for depth in range(1 + AHEAD):
            for judge in self._judges:
                if self._waiting and len(judge.held) == depth:
                    self._send(judge, self._waiting.popleft())

    def _send(self, judge: _Judge, number: int) -> None:
        verdict, text = self._open[number]
        # Log-probs are no business of a verifier, and the longest part of the message.
        completion = replace(verdict.completion, rollout_logprobs=(), weight_versions=())
        if not judge.held:
            judge.since_s = time.monotonic()
        judge.held.append(number)
        try:
            judge.connection.send((number, verdict.prompt, text, completion))
        except (BrokenPipeError, ConnectionResetError):
            return  # its end of file will be read in a moment
        except Exception as error:
            # A row's column may hold what cannot be pickled.
            judge.held.pop()
            self._settle(number, invalid(f"the answer cannot be handed to a process: {type(error).__name__}: {error}"))

    def _receive(self, judge: _Judge) -> None:
        try:
            while judge.connection.poll():
                number, reward = judge.connection.recv()
                judge.held.remove(number)
                judge.since_s = time.monotonic()
                self._settle(number, reward)
        except (EOFError, OSError):
            self.num_deaths += 1
            self._replace(judge, "the verifier's process died (crash, exit or out of memory)")

    def _next_limit_s(self) -> float | None:
        limits = [judge.since_s + self._timeout_s for judge in self._judges if judge.held]
        return max(0.0, min(limits) - time.monotonic()) if limits else None

    def _end_overdue(self) -> None:
        for judge in list(self._judges):
            if judge.held and time.monotonic() - judge.since_s >= self._timeout_s and not judge.connection.poll():
                self.num_timeouts += 1
                self._replace(judge, f"no verdict within reward.timeout_s = {self._timeout_s:g} s")

    def _replace(self, judge: _Judge, error: str) -> None:
        kill_tree(judge.pid)
        judge.connection.close()
        if judge.held:
            self._settle(judge.held.popleft(), invalid(error))
        self._waiting.extendleft(reversed(judge.held))
        self._judges[self._judges.index(judge)] = self._start_judge()

    def _start_judge(self) -> _Judge:
        ours, theirs = socket.socketpair()
        socket.send_fds(self._control, [b"f"], [theirs.fileno()])
        theirs.close()
        return _Judge(pid=self._answers.recv(), connection=Connection(ours.detach()))

    def _settle(self, number: int, reward: Reward) -> None:
        verdict, _ = self._open.pop(number)
        verdict.settle(reward)

    def _fail(self, error: str) -> None:
        while not self._closed:
            self._take_in()
            for number in list(self._open):
                self._settle(number, invalid(error))
            os.read(self._wake_reading, 65536)
