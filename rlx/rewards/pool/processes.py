"""Judging answers in processes that can be killed.

Who waits for whom: the feeder thread of ``ScoringService`` puts answers in a queue; each of the
``reward.num_workers`` threads here takes one, hands it to the process of its own and waits for the verdict, at most
``reward.timeout_s``. A process that runs out of time is killed with all it started; one that dies (crash, memory) is noticed
at once. Both cost the answer they were at alone: it is invalid and counted, and the next one gets a new process.
"""

from __future__ import annotations

import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from rlx.config.schema import RewardConfig
from rlx.obs.log import logger
from rlx.rewards.base import invalid
from rlx.rewards.pool.channel import Channel, frame
from rlx.rewards.pool.process_tree import kill_tree
from rlx.rewards.pool.service import ScoringService, Verdict
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Reward


@dataclass(slots=True)
class _Judge:
    """One process."""

    pid: int
    channel: Channel

    def end(self) -> None:
        kill_tree(self.pid)
        self.channel.close()


class ProcessPool(ScoringService):
    """Judges with ``config.num_workers`` processes. ``num_deaths`` counts those that ended by themselves. ``gives_group``: every
    request carries its group."""

    def __init__(self, decode: Callable[[Sequence[int]], str], config: RewardConfig, *, gives_group: bool = False) -> None:
        super().__init__(decode, config)
        self._gives_group = gives_group
        self.num_deaths = 0
        self._control, theirs = socket.socketpair()
        # The children's messages must not mix with this program's own; only stderr is shared.
        command = [sys.executable, "-m", "rlx.rewards.pool.fork_server", str(theirs.fileno())]
        self._fork_server = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        theirs.close()
        assert self._fork_server.stdin is not None
        with suppress(BrokenPipeError), self._fork_server.stdin as stream:
            pickle.dump(config, stream)
        self._births = Channel(self._control)
        self._work: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
        # Guards the births and the two counts.
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, name="reward-judge", daemon=True) for _ in range(config.num_workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            self._work.put(verdict)

    def close(self) -> None:
        """End the judges, the process they were forked from, and the threads; what is not judged by then is invalid."""
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._work.put(None)
        kill_tree(self._fork_server.pid)
        self._fork_server.wait()
        for thread in self._threads:
            thread.join()
        self._births.close()

    def _run(self) -> None:
        judge: _Judge | None = None
        while (verdict := self._work.get()) is not None:
            request = verdict.request if self._gives_group else replace(verdict.request, group=())
            try:
                judge = self._living(judge)
                reward, judge = self._ask(judge, request)
            except Exception as error:
                # Whatever it is, nobody else would settle this verdict: without it the trainer waits for ever.
                if not self._closed:
                    logger.exception("the reward processes cannot go on")
                reward, judge = invalid(f"the reward processes cannot go on: {type(error).__name__}: {error}"), None
            verdict.settle(reward)
        if judge is not None:
            judge.channel.close()

    def _ask(self, judge: _Judge, request: RewardRequest) -> tuple[Reward, _Judge | None]:
        """The verdict, and the judge if it lives on."""
        try:
            data = frame(request)
        except Exception as error:
            # A row's column may hold what cannot be pickled.
            return invalid(f"the answer cannot be handed to a process: {type(error).__name__}: {error}"), judge
        try:
            judge.channel.write(data)
            return judge.channel.receive(), judge
        except TimeoutError:
            with self._lock:
                self.num_timeouts += 1
            cause = f"no verdict within reward.timeout_s = {self._timeout_s:g} s"
        except Exception:  # its end is closed or broken, or a verifier wrote there what is no message
            with self._lock:
                self.num_deaths += 1
            cause = "the verifier's process died (crash, exit or out of memory)"
        judge.end()
        return invalid(cause), None

    def _living(self, judge: _Judge | None) -> _Judge:
        """``judge``, or a new one where there is none or it died while it had nothing to do."""
        if judge is not None and judge.channel.is_open:
            return judge
        if judge is not None:
            judge.end()
        with self._lock:
            self.num_deaths += judge is not None
            ours, theirs = socket.socketpair()
            socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            theirs.close()
            return _Judge(pid=self._births.receive(), channel=Channel(ours, self._timeout_s))
