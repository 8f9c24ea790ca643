"""The trainer ranks as one: phases of a publication that all go through together, and calls that the lead makes for all."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rlx.rollout.sglang.control import EngineControl
from rlx.sync.errors import SyncError
from rlx.sync.fanout import call_all
from rlx.sync.group import GRACE_S, Engine

Share = Callable[[str | None], list[str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherPlace:
    """A trainer rank's part: one sender a pipeline stage, one lead (who speaks for all to the engines) in the whole run."""

    stage: int
    num_stages: int
    is_sender: bool
    is_lead: bool
    rank: int


class Crew:
    """This rank among the others. ``share`` all-gathers one optional text over the trainer ranks, in rank order.

    ``phase_s`` adds up the seconds spent in each phase, by its name.
    """

    def __init__(self, place: PublisherPlace, engines: tuple[Engine, ...], share: Share, timeout_s: float) -> None:
        self.place = place
        self.engines = engines
        self.share = share
        self._timeout_s = timeout_s
        self.phase_s: dict[str, float] = defaultdict(float)

    def together[T](self, what: str, phase: str, work: Callable[[], T]) -> list[T]:
        """Do this rank's part of a phase and learn all ranks' results (they travel as JSON). A failure raises on all."""
        began = time.monotonic()
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # raised again below, once the other ranks know
            error = caught
        problem = None if error is None else f"trainer rank {self.place.rank}: {error}"
        unwell = list(error.engines) if isinstance(error, SyncError) else []
        answers = [json.loads(text) for text in self.share(json.dumps([problem, result, unwell])) if text is not None]
        self.phase_s[phase] += time.monotonic() - began
        problems = [answer[0] for answer in answers if answer[0] is not None]
        if problems:
            engines = [url for answer in answers for url in answer[2]]
            raise SyncError(f"{what}, phase {phase}: {'; '.join(problems)}", engines) from error
        return [answer[1] for answer in answers]

    def lead_asks[T](self, call: Callable[[Engine], T]) -> dict[str, T]:
        """On the lead: ``call`` for all engines at once, results by url. On other ranks: nothing."""
        if not self.place.is_lead:
            return {}
        calls = {engine.url: partial(call, engine) for engine in self.engines}
        return call_all(calls, 2 * self._timeout_s + GRACE_S)

    def lead_calls[T](self, call: Callable[[EngineControl], T]) -> dict[str, T]:
        """The same with the engine's control alone."""
        return self.lead_asks(lambda engine: call(engine.control))
