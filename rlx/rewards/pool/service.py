"""Scoring rollout groups while later ones are still being written, in threads of this process.

Who waits for whom: one feeder thread consumes the incoming groups and hands every answer to those who judge; the
caller's thread takes the groups in the order they came in and waits for their verdicts. The feeder ends with its input, or
at the next group once the caller has stopped early.

Threads suit verifiers that wait for a server. A Python thread cannot be killed: a verdict that runs out of time is counted
as invalid and its thread goes on until the verifier returns, replaced meanwhile by a new one. Verifiers that compute run in
processes instead (``rlx.rewards.pool.processes``).
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from rlx.config.schema import RewardConfig
from rlx.rewards.base import Verifier, invalid, judge
from rlx.rewards.request import Answer, RewardRequest
from rlx.types.rollout import (
    Reward,
    RolloutGroup,
    Trajectory,
)

# How often the clock is read while a verdict is awaited.
MAX_TICK_S = 0.1


class AllVerdictsInvalidError(RuntimeError):
    """Not one sample of a batch could be scored."""


@dataclass(slots=True, eq=False)
class Verdict:
    """One answer on its way to a reward. The first of worker and clock to settle it wins."""

    request: RewardRequest
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


class ScoringService(ABC):
    """Implements ``RewardService`` over ``submit``, which takes an answer to whoever judges it.

    ``decode`` turns the ids of a turn into the text that verifiers see. ``num_timeouts`` counts the verdicts that ran out
    of time.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], config: RewardConfig) -> None:
        self._decode, self._timeout_s = decode, config.timeout_s
        self._closed = False
        self.num_timeouts = 0

    @abstractmethod
    def submit(self, verdicts: Sequence[Verdict]) -> None:
        """Have the verdicts of one group settled some time; called on the feeder thread."""

    def close(self) -> None:
        """End whoever judges."""
        self._closed = True

    def tick(self) -> None:  # noqa: B027 - only threads have no clock of their own
        """Called now and then on the caller's thread while a verdict is awaited."""

    def score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        """Yield the groups with rewards, in the order they came. An error of ``groups`` is raised here.

        Raises AllVerdictsInvalidError at the end, quoting the first cause, when no verdict of the batch is valid.
        """
        if self._closed:
            raise RuntimeError("the reward pool is closed")
        ready: queue.SimpleQueue[tuple[RolloutGroup, list[Verdict]] | BaseException | None] = queue.SimpleQueue()
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

    def _feed(
        self,
        groups: Iterable[RolloutGroup],
        ready: queue.SimpleQueue[tuple[RolloutGroup, list[Verdict]] | BaseException | None],
        stopped: threading.Event,
    ) -> None:
        try:
            for group in groups:
                if stopped.is_set():
                    return
                verdicts = self._verdicts(group)
                self.submit([verdict for verdict in verdicts if verdict.reward is None])
                ready.put((group, verdicts))
            ready.put(None)
        except BaseException as error:  # it crosses to the caller's thread, which raises it
            ready.put(error)

    def _verdicts(self, group: RolloutGroup) -> list[Verdict]:
        """One a trajectory; those whose ids the tokenizer refuses are settled, as that says nothing about the others."""
        texts = [self._text_of(trajectory) for trajectory in group.trajectories]
        answers = tuple(
            Answer(response="" if isinstance(text, Reward) else text, trajectory=trajectory)
            for text, trajectory in zip(texts, group.trajectories, strict=True)
        )
        verdicts = []
        for text, answer in zip(texts, answers, strict=True):
            request = RewardRequest(prompt=group.prompt, response=answer.response, trajectory=answer.trajectory, group=answers)
            verdicts.append(Verdict(request, text if isinstance(text, Reward) else None))
        return verdicts

    def _text_of(self, trajectory: Trajectory) -> str | Reward:
        try:
            return self._decode(trajectory.turns[-1] if trajectory.turns else ())
        except Exception as error:
            return invalid(f"{type(error).__name__}: {error}")  # a tokenizer may refuse ids in any way

    def _wait(self, verdict: Verdict) -> Reward:
        """Any verdict may be what keeps the threads busy, so the clock is read for all of them while waiting for one."""
        while not verdict.wait(min(self._timeout_s, MAX_TICK_S)):
            self.tick()
        assert verdict.reward is not None
        return verdict.reward


class RewardPool(ScoringService):
    """Judges with ``config.num_workers`` threads."""

    def __init__(self, verifier: Verifier, decode: Callable[[Sequence[int]], str], config: RewardConfig) -> None:
        super().__init__(decode, config)
        self._verifier, self._max_abs = verifier, config.max_abs
        # Running verdicts and when each began.
        self._running: dict[Verdict, float] = {}
        self._running_lock = threading.Lock()
        self._work: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
        self._num_workers = config.num_workers
        for _ in range(config.num_workers):
            self._add_worker()

    def submit(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            self._work.put(verdict)

    def close(self) -> None:
        """Let the threads end after the verdicts they are at; returns at once."""
        self._closed = True
        for _ in range(self._num_workers):
            self._work.put(None)

    def _add_worker(self) -> None:
        threading.Thread(target=self._run, name="reward-verdict", daemon=True).start()

    def _run(self) -> None:
        while (verdict := self._work.get()) is not None:
            if verdict.reward is not None:
                continue
            with self._running_lock:
                self._running[verdict] = time.monotonic()
            in_time = verdict.settle(judge(self._verifier, verdict.request, self._max_abs))
            with self._running_lock:
                self._running.pop(verdict, None)
            if not in_time:
                return  # another thread took this one's place

    def tick(self) -> None:
        with self._running_lock:
            overdue = [verdict for verdict, start_s in self._running.items() if time.monotonic() - start_s >= self._timeout_s]
            for verdict in overdue:
                del self._running[verdict]
        for verdict in overdue:
            if verdict.settle(invalid(f"no verdict within reward.timeout_s = {self._timeout_s:g} s")):
                self.num_timeouts += 1
                self._add_worker()
