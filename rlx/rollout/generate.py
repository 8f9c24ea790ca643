"""Groups of samples from engines over HTTP: the RolloutService of a real run.

One thread with an asyncio loop belongs to a service, from its first ``generate`` to ``close``. It consumes prompts,
produces finished groups into a queue and waits for engines only; the consumer waits on the queue. Closing the
iterator, closing the service or the first failure cancels what is in flight, and the engines see the disconnects.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import aiohttp

from rlx.config.schema import RolloutConfig
from rlx.rollout.completion import Completion
from rlx.rollout.images import ImageStore, PlacedImages, check_places
from rlx.rollout.record import RolloutRecorder
from rlx.rollout.router import EngineCare, EngineRouter
from rlx.rollout.sglang.client import (
    EngineClient,
    RetryPolicy,
    RolloutStats,
    check_token_ids,
    check_url,
    open_session,
)
from rlx.types.rollout import (
    Prompt,
    RolloutGroup,
    SamplingSpec,
    given,
)


def sample_seed(seed: int, prompt_id: int, index: int) -> int:
    """The seed in [0, 2^31) of sample ``index`` of a prompt: a hash, so that no order or timing has a part in it."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, prompt_id, index), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def validate_prompts(prompts: Sequence[Prompt], vocab_size: int, images: ImageStore | None = None) -> None:
    """Raise ValueError, naming the prompt_id, for an empty prompt, ids outside [0, vocab_size), or images that do not stand on
    placeholders (or that the model does not see)."""
    for prompt in prompts:
        what = f"prompt {prompt.prompt_id}"
        check_token_ids(prompt.token_ids, vocab_size, f"{what}: token_ids")
        if prompt.images and images is None:
            raise ValueError(f"{what} has images, and the model does not see any")
        if images is not None:
            check_places(prompt.token_ids, prompt.images, images.vision, what)


def validate_sampling(sampling: SamplingSpec) -> None:
    """Raise ValueError for settings that an engine would refuse or misread."""
    problems = []
    if sampling.num_samples < 1:
        problems.append(f"num_samples must be at least 1, got {sampling.num_samples}")
    if sampling.max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}")
    if not sampling.temperature >= 0:
        problems.append(f"temperature must be at least 0, got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        problems.append(f"top_p must be in (0, 1], got {sampling.top_p}")
    if sampling.top_k != -1 and sampling.top_k < 1:
        problems.append(f"top_k must be -1 (off) or at least 1, got {sampling.top_k}")
    if problems:
        raise ValueError("sampling: " + "; ".join(problems))


@dataclass(frozen=True, slots=True)
class EngineMaker:
    """What every client of a service has in common, and the engines that it begins with."""

    endpoints: tuple[str, ...]
    config: RolloutConfig
    vocab_size: int
    api_key: str | None = field(repr=False)
    care: EngineCare | None

    def client(self, url: str, session: aiohttp.ClientSession, stats: RolloutStats) -> EngineClient:
        limit_s = self.config.request_timeout_s
        return EngineClient(url, limit_s, self.api_key, vocab_size=self.vocab_size, session=session, stats=stats)


class HttpRolloutService:
    """Samples from running engines at ``endpoints``; satisfies ``RolloutService`` and adds ``begin_step``.

    Every sample is one HTTP request with a seed of its own, at most ``config.max_concurrent_requests`` at a time,
    routed to the least loaded engine, retried and resubmitted (see ``router``). With ``recorder`` each group is
    written before it is yielded. ``stats`` counts over the life of the service. ``care`` is asked for help when engines
    fail for good; with it there may be no endpoints until ``use`` names some. Not for concurrent consumers.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        config: RolloutConfig,
        vocab_size: int,
        recorder: RolloutRecorder | None = None,
        *,
        api_key: str | None = None,
        care: EngineCare | None = None,
    ) -> None:
        if not endpoints and care is None:
            raise ValueError("rollout.endpoints: at least one engine url is needed")
        for url in endpoints:
            check_url(url)
        self.stats = RolloutStats()
        self._make = EngineMaker(tuple(endpoints), config, vocab_size, api_key, care)
        self._vocab_size = vocab_size
        self._recorder = recorder
        self._images: ImageStore | None = None
        self._serving: tuple[tuple[str, ...], int] | None = None
        self._counted: dict[str, int] = {}
        self._loop: _LoopThread | None = None
        self._closed = False

    def begin_step(self, step: int) -> None:
        """Say which step the following ``generate`` calls belong to (the recorder wants to know)."""
        if self._recorder is not None:
            self._recorder.begin_step(step)

    def show(self, images: ImageStore) -> None:
        """Take the images of prompts from here; before the first ``generate``."""
        self._images = images

    def use(self, urls: Sequence[str], version: int) -> None:
        """Ask these engines from now on, all of which serve ``version`` (any thread)."""
        self._serving = (tuple(urls), version)
        if self._loop is not None:
            self._loop.use(*self._serving)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSpec) -> Iterator[RolloutGroup]:
        """Yield one group a prompt in the order they finish; requests start at the first ``next``.

        Raises ValueError at once for bad prompts or settings; EngineError (the first failure, the rest is cancelled)
        while iterating; RuntimeError when the service is closed.
        """
        validate_prompts(prompts, self._vocab_size, self._images)
        validate_sampling(sampling)
        if self._closed:
            raise RuntimeError("generate was called on a closed rollout service")
        return self._stream(tuple(prompts), sampling)

    def counts(self) -> Mapping[str, float]:
        """``rollout/...``: retries, resubmissions, sequences given up and engines set aside since the last call."""
        now = {name: getattr(self.stats, name) for name in ("retries", "resubmissions", "failures", "engines_set_aside")}
        before, self._counted = self._counted, now
        return {f"rollout/{name}": float(count - before.get(name, 0)) for name, count in now.items()}

    def close(self) -> None:
        """Cancel what runs, close every connection and end the thread. May be called twice."""
        self._closed = True
        if self._loop is not None:
            self._loop.close()
        if self._recorder is not None:
            self._recorder.close()

    def _stream(self, prompts: tuple[Prompt, ...], sampling: SamplingSpec) -> Iterator[RolloutGroup]:
        if self._closed:
            raise RuntimeError("generate was iterated on a closed rollout service")
        if self._loop is None:
            make = self._make if self._serving is None else replace(self._make, endpoints=self._serving[0])
            self._loop = _LoopThread(make, self.stats, self._images)
            if self._serving is not None:
                self._loop.use(*self._serving)
        run = self._loop.start(prompts, sampling)
        try:
            while (group := run.next_group()) is not None:
                if self._recorder is not None:
                    self._recorder.append(group)
                yield group
        finally:
            self._loop.cancel(run)


class _Run:
    """One ``generate`` call: groups cross from the loop's thread to the consumer's through a queue.

    The task's done callback always puts the last entry (None or the failure), even for a task cancelled before it
    began, so that the consumer cannot wait for ever.
    """

    def __init__(self) -> None:
        self._entries: queue.SimpleQueue[RolloutGroup | BaseException | None] = queue.SimpleQueue()
        self._ended = False
        self._task: asyncio.Task[None] | None = None

    def watch(self, task: asyncio.Task[None]) -> None:
        """Take the end of ``task`` as the end of the run (loop's thread)."""
        self._task = task
        task.add_done_callback(self._note_end)

    def put(self, group: RolloutGroup) -> None:
        self._entries.put(group)

    def refuse(self) -> None:
        self._entries.put(RuntimeError("the rollout service was closed before it generated"))

    def cancel_task(self) -> None:
        """Loop's thread; runs after ``watch``, whose call was queued first."""
        assert self._task is not None
        self._task.cancel()

    def next_group(self) -> RolloutGroup | None:
        """The next finished group, None at the end; raises the run's failure."""
        entry = self._entries.get()
        if isinstance(entry, RolloutGroup):
            return entry
        self._ended = True
        if entry is not None:
            raise entry
        return None

    def drain(self) -> None:
        """Wait for the end, dropping groups that nobody wants any more."""
        while not self._ended:
            self._ended = not isinstance(self._entries.get(), RolloutGroup)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._entries.put(RuntimeError("the rollout service was closed while it generated"))
        else:
            self._entries.put(task.exception())


class _LoopThread:
    """The thread, its loop, its one HTTP session. Ends only by ``close``, which the owner calls."""

    def __init__(self, make: EngineMaker, stats: RolloutStats, images: ImageStore | None) -> None:
        self._make = make
        self._images = images
        self._stats = stats
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._closing = False
        self._lock = threading.Lock()  # held to queue calls: none may reach a closed loop
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="rlx-rollout", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def start(self, prompts: tuple[Prompt, ...], sampling: SamplingSpec) -> _Run:
        """Begin a run (any thread)."""
        run = _Run()
        with self._lock:
            if self._closing:
                run.refuse()
            else:
                self._loop.call_soon_threadsafe(self._spawn, run, prompts, sampling)
        return run

    def cancel(self, run: _Run) -> None:
        """Stop a run and wait until the loop has let go of it (any thread); nothing happens when it has ended."""
        with self._lock:
            if not self._closing:  # else ``close`` cancels it
                self._loop.call_soon_threadsafe(run.cancel_task)
        run.drain()

    def close(self) -> None:
        """Cancel all runs, close the session, join the thread (any thread but the loop's)."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    def use(self, urls: Sequence[str], version: int) -> None:
        """Route to these engines (any thread)."""
        with self._lock:
            if not self._closing:
                self._loop.call_soon_threadsafe(self._use, urls, version)

    def _use(self, urls: Sequence[str], version: int) -> None:
        self._router.use([self._make.client(url, self._session, self._stats) for url in urls], version)

    async def _open(self) -> None:
        self._session = open_session()
        config = self._make.config
        engines = [self._make.client(url, self._session, self._stats) for url in self._make.endpoints]
        retry = RetryPolicy(max_retries=config.max_retries)
        self._router = EngineRouter(engines, retry, self._stats, care=self._make.care)
        self._in_flight = asyncio.Semaphore(config.max_concurrent_requests)

    async def _main(self) -> None:
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._router.close()
        await self._session.close()

    def _spawn(self, run: _Run, prompts: tuple[Prompt, ...], sampling: SamplingSpec) -> None:
        task = asyncio.create_task(self._generate(run, prompts, sampling))
        self._tasks.add(task)
        run.watch(task)
        task.add_done_callback(self._tasks.discard)

    async def _generate(self, run: _Run, prompts: tuple[Prompt, ...], sampling: SamplingSpec) -> None:
        tasks = [asyncio.create_task(self._group(run, prompt, sampling)) for prompt in prompts]
        await _all_or_first_failure(tasks)

    async def _group(self, run: _Run, prompt: Prompt, sampling: SamplingSpec) -> None:
        tasks = [asyncio.create_task(self._sample(prompt, sampling, index)) for index in range(sampling.num_samples)]
        await _all_or_first_failure(tasks)
        asked = given(prompt.token_ids)  # one for all samples
        run.put(RolloutGroup(prompt=prompt, trajectories=tuple(task.result().after(asked, prompt.images) for task in tasks)))

    async def _sample(self, prompt: Prompt, sampling: SamplingSpec, index: int) -> Completion:
        seed = sample_seed(sampling.seed, prompt.prompt_id, index)
        shown = PlacedImages(store=self._images, spans=prompt.images) if self._images is not None and prompt.images else None
        async with self._in_flight:  # first come, first served: early prompts finish first
            return await self._router.generate(prompt.token_ids, replace(sampling, num_samples=1), seed, shown)


async def _all_or_first_failure[T](tasks: Sequence[asyncio.Task[T]]) -> None:
    """Wait for all tasks. On the first failure, or when cancelled, cancel the others, wait for them and raise."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
