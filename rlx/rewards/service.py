"""Scoring rollout groups while later ones are still being written.

Who waits for whom: one feeder thread consumes the incoming groups and hands every answer to the verdict threads; the
caller's thread takes the groups in the order they came in, waits for their verdicts, and ends those that run for longer
than ``reward.timeout_s``. The feeder ends with its input, or at the next group once the caller has stopped early.

A Python thread cannot be killed: a verdict that runs out of time is counted as invalid and its thread goes on until the
verifier returns, replaced meanwhile by a new one. A verifier that hangs often, or that is heavy on Python's lock, wants
processes instead of threads: that pool would be a second implementation of ``RewardService``.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from rlx.config.schema import RewardConfig
from rlx.rewards.base import Verifier, invalid, is_finite_number
from rlx.types import Completion, Prompt, Reward, RolloutGroup

# How often the clock is read while a verdict is awaited.
MAX_TICK_S = 0.1


class AllVerdictsInvalidError(RuntimeError):
    """Not one sample of a batch could be scored."""


@dataclass(slots=True, eq=False)
class _Verdict:
    """One answer on its way to a reward. The first of worker and clock to settle it wins."""

    prompt: Prompt
    completion: Completion
    reward: Reward | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def settle(self, reward: Reward) -> bool:
        """True if ``reward`` became the verdict; False if it came too late."""
        with self.changed:
            if self.reward is not None:
                return False
            self.reward = reward
            self.changed.notify_all()
            return True

    def wait(self, timeout_s: float) -> bool:
        """Wait for it to be settled, at most ``timeout_s``; True if it is."""
        with self.changed:
            return self.changed.wait_for(lambda: self.reward is not None, timeout_s)


class RewardPool:
    """Implements ``RewardService`` with ``config.num_workers`` threads.

    ``decode`` turns response token ids into text (without special tokens) and is called on the verdict threads.
    ``num_timeouts`` counts the verdicts that ran out of time.
    """

    def __init__(self, verifier: Verifier, decode: Callable[[Sequence[int]], str], config: RewardConfig) -> None:
        self._verifier, self._decode, self._timeout_s = verifier, decode, config.timeout_s
        # Running verdicts and when each began.
        self._running: dict[_Verdict, float] = {}
        self._running_lock = threading.Lock()
        self._work: queue.SimpleQueue[_Verdict | None] = queue.SimpleQueue()
        self._closed = False
        self._num_workers = config.num_workers
        self.num_timeouts = 0
        for _ in range(config.num_workers):
            self._add_worker()

    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        """Yield the groups with rewards, in the order they came. An error of ``groups`` is raised here.

        Raises AllVerdictsInvalidError at the end, quoting the first cause, when no verdict of the batch is valid.
        """
        if self._closed:
            raise RuntimeError("the reward pool is closed")
        ready: queue.SimpleQueue[tuple[RolloutGroup, list[_Verdict]] | BaseException | None] = queue.SimpleQueue()
        stopped = threading.Event()
        threading.Thread(target=self._feed, args=(groups, ready, stopped), name="reward-feeder", daemon=True).start()
        num_verdicts, num_valid, first_cause = 0, 0, ""
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                group, verdicts = item
                rewards = tuple(self._wait(verdict) for verdict in verdicts)
                num_verdicts += len(rewards)
                num_valid += sum(reward.valid for reward in rewards)
                first_cause = first_cause or next((reward.error or "" for reward in rewards if not reward.valid), "")
                yield replace(group, rewards=rewards)
        finally:
            stopped.set()
        if num_verdicts and not num_valid:
            raise AllVerdictsInvalidError(f"all {num_verdicts} verdicts of the batch are invalid; the first: {first_cause}")

    def close(self) -> None:
        """Let the threads end after the verdicts they are at; returns at once."""
        self._closed = True
        for _ in range(self._num_workers):
            self._work.put(None)

    def _feed(
        self,
        groups: Iterable[RolloutGroup],
        ready: queue.SimpleQueue[tuple[RolloutGroup, list[_Verdict]] | BaseException | None],
        stopped: threading.Event,
    ) -> None:
        try:
            for group in groups:
                if stopped.is_set():
                    return
                verdicts = [_Verdict(group.prompt, completion) for completion in group.completions]
                for verdict in verdicts:
                    self._work.put(verdict)
                ready.put((group, verdicts))
            ready.put(None)
        except BaseException as error:  # it crosses to the caller's thread, which raises it
            ready.put(error)

    def _add_worker(self) -> None:
        threading.Thread(target=self._run, name="reward-verdict", daemon=True).start()

    def _run(self) -> None:
        while (verdict := self._work.get()) is not None:
            if verdict.reward is not None:
                continue
            with self._running_lock:
                self._running[verdict] = time.monotonic()
            in_time = verdict.settle(self._judge(verdict))
            with self._running_lock:
                self._running.pop(verdict, None)
            if not in_time:
                return  # another thread took this one's place

    def _judge(self, verdict: _Verdict) -> Reward:
        try:
            text = self._decode(verdict.completion.token_ids)
            reward = self._verifier(verdict.prompt, text, verdict.completion)
            if reward.valid and not is_finite_number(reward.value):
                return invalid(f"the verifier returned {reward.value!r}, which is not a finite number")
            return reward
        except Exception as error:
            # Verifiers are users' code: whatever they raise makes this sample invalid, never the run fail.
            return invalid(f"{type(error).__name__}: {error}")

    def _wait(self, verdict: _Verdict) -> Reward:
        """Any verdict may be what keeps the threads busy, so the clock is read for all of them while waiting for one."""
        while not verdict.wait(min(self._timeout_s, MAX_TICK_S)):
            self._end_overdue()
        assert verdict.reward is not None
        return verdict.reward

    def _end_overdue(self) -> None:
        with self._running_lock:
            overdue = [verdict for verdict, start_s in self._running.items() if time.monotonic() - start_s >= self._timeout_s]
            for verdict in overdue:
                del self._running[verdict]
        for verdict in overdue:
            if verdict.settle(invalid(f"no verdict within reward.timeout_s = {self._timeout_s:g} s")):
                self.num_timeouts += 1
                self._add_worker()
