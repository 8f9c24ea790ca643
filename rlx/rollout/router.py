"""Several engines behind one ``generate``: the least loaded well engine gets the next request.

Load is tokens in flight (prompt + what may still be generated), then requests. An engine that fails ``max_failures``
times in a row is set aside; a probe task per such engine asks its health every ``probe_interval_s`` while requests
come in, and brings it back if it still serves the published weights. One that fails its probe, or has to be set aside
again, is reported as unwell. When all are aside, requests wait for one joint probe, then for ``EngineCare.recover``, and
fail if neither brings an engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlx.obs.log import logger
from rlx.rollout.completion import Completion
from rlx.rollout.images import PlacedImages
from rlx.rollout.sglang.answers import EngineError
from rlx.rollout.sglang.client import (
    EngineClient,
    RetryPolicy,
    RolloutStats,
    check_token_ids,
    complete,
)
from rlx.types.rollout import SamplingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCare:
    """Who looks after the engines. ``recover`` blocks until some serve the present weights (and says so with ``use``);
    ``report_unwell`` returns at once."""

    recover: Callable[[], None]
    report_unwell: Callable[[str, str], None]


@dataclass(slots=True, eq=False)
class _Slot:
    """One engine as the router sees it. ``aside`` keeps requests away until a probe succeeds."""

    client: EngineClient
    tokens: int = 0
    requests: int = 0
    failures: int = 0
    aside: bool = False
    times_aside: int = 0
    probe_at: float = 0.0
    last_error: str = "no error seen"
    probe: asyncio.Task[None] | None = None


class NoEngineError(EngineError):
    """No engine is left; lists each url with its last error."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        lines = [f"{slot.client.url}: {slot.last_error}" for slot in slots]
        super().__init__("engines", f"none of {len(slots)} engines is usable:\n  " + "\n  ".join(lines))


class EngineRouter:
    """Routes, retries and resubmits over ``engines`` (at least one; closing them is the owner's task)."""

    def __init__(
        self,
        engines: Sequence[EngineClient],
        retry: RetryPolicy,
        stats: RolloutStats,
        *,
        max_failures: int = 3,
        probe_interval_s: float = 5.0,
        care: EngineCare | None = None,
    ) -> None:
        if not engines:
            raise ValueError("a router needs at least one engine")
        self._slots = [_Slot(engine) for engine in engines]
        self._retry = retry
        self._stats = stats
        self._max_failures = max_failures
        self._probe_interval_s = probe_interval_s
        self._care = care
        self._recovery: asyncio.Task[None] | None = None
        self._version: int | None = None

    def use(self, engines: Sequence[EngineClient], version: int) -> None:
        """Route to these from now on; all of them serve ``version``. What runs on others goes on while they answer."""
        known = {slot.client.url: slot for slot in self._slots}
        self._slots = [known.get(engine.url) or _Slot(engine) for engine in engines]
        self._version = version
        for slot in self._slots:
            slot.aside, slot.failures = False, 0

    async def generate(
        self, token_ids: Sequence[int], sampling: SamplingSpec, seed: int, images: PlacedImages | None = None
    ) -> Completion:
        """One whole answer, from whichever engines. ValueError for bad ids; EngineError or NoEngineError at the end
        of retries. An engine that ran into the time limit is not asked again for this sequence."""
        check_token_ids(token_ids, self._slots[0].client.vocab_size)
        avoid: set[_Slot] = set()

        async def part(ids: Sequence[int], spec: SamplingSpec) -> Completion:
            return await self._retry.run(lambda: self._attempt(ids, spec, seed, images, avoid), self._stats)

        return await complete(token_ids, sampling, part, self._stats)

    async def close(self) -> None:
        """Stop probing."""
        tasks = [slot.probe for slot in self._slots if slot.probe is not None]
        tasks += [] if self._recovery is None else [self._recovery]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _attempt(
        self, ids: Sequence[int], spec: SamplingSpec, seed: int, images: PlacedImages | None, avoid: set[_Slot]
    ) -> Completion:
        slot = await self._pick(avoid)
        cost = len(ids) + spec.max_new_tokens
        slot.tokens += cost
        slot.requests += 1
        try:
            answer = await slot.client.attempt(ids, spec, seed, images)
        except EngineError as error:
            if error.retryable or error.timed_out:
                self._note_failure(slot, error)
            if error.timed_out:
                avoid.add(slot)
                error.retryable = any(not other.aside and other not in avoid for other in self._slots)
            raise
        finally:
            slot.tokens -= cost
            slot.requests -= 1
        slot.failures = 0
        return answer

    async def _pick(self, avoid: set[_Slot]) -> _Slot:
        for slot in self._slots:
            if slot.aside and slot.probe is None and time.monotonic() >= slot.probe_at:
                slot.probe = asyncio.create_task(self._probe(slot))
        usable = [slot for slot in self._slots if not slot.aside]
        if not usable:
            await self._probe_all()
            usable = [slot for slot in self._slots if not slot.aside]
        if not usable and self._care is not None:
            await self._recover(self._care)
            usable = [slot for slot in self._slots if not slot.aside]
        if not usable:
            raise NoEngineError(self._slots)
        wanted = [slot for slot in usable if slot not in avoid]
        return min(wanted or usable, key=lambda slot: (slot.tokens, slot.requests))

    def _note_failure(self, slot: _Slot, error: EngineError) -> None:
        slot.failures += 1
        slot.last_error = error.problem
        if slot.failures >= self._max_failures and not slot.aside:
            slot.aside = True
            slot.times_aside += 1
            self._stats.engines_set_aside += 1
            if slot.times_aside > 1:
                self._report(slot)
            slot.probe_at = time.monotonic() + self._probe_interval_s
            logger.warning("engine %s set aside after %d failures in a row: %s", slot.client.url, slot.failures, error.problem)

    def _report(self, slot: _Slot) -> None:
        if self._care is not None and slot in self._slots:
            self._care.report_unwell(slot.client.url, slot.last_error)

    async def _recover(self, care: EngineCare) -> None:
        """Concurrent callers share one recovery."""
        if self._recovery is None:
            logger.warning("no engine is usable; waiting for one")
            self._recovery = asyncio.create_task(asyncio.to_thread(care.recover))
            self._recovery.add_done_callback(self._end_recovery)
        await asyncio.shield(self._recovery)

    def _end_recovery(self, task: asyncio.Task[None]) -> None:
        self._recovery = None

    async def _probe_all(self) -> None:
        """Ask every engine's health once; concurrent callers share the probes under way."""
        for slot in self._slots:
            if slot.probe is None:
                slot.probe = asyncio.create_task(self._probe(slot))
        probes = [slot.probe for slot in self._slots if slot.probe is not None]
        await asyncio.wait(probes, return_when=asyncio.ALL_COMPLETED)

    async def _probe(self, slot: _Slot) -> None:
        try:
            await slot.client.health()
            if self._version is not None:
                await slot.client.check_version(self._version)
        except EngineError as error:
            slot.last_error = error.problem
            slot.probe_at = time.monotonic() + self._probe_interval_s
            if slot.aside:
                self._report(slot)
        else:
            if slot.aside:
                logger.info("engine %s is back", slot.client.url)
            slot.aside = False
            slot.failures = 0
        finally:
            slot.probe = None
