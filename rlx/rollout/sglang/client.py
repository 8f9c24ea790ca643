"""One engine over HTTP: SGLang's ``/generate`` with token ids in and token ids out, checked strictly both ways.

This file knows one server and one sequence at a time; it does not know groups, several engines or weight updates
(``router`` and ``generate`` build on it). What it refuses: ids the engine cannot hold (stock SGLang exits on one) and
answers whose parts do not agree.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import aiohttp

from rlx.rollout.completion import Completion
from rlx.rollout.images import PlacedImages
from rlx.rollout.sglang.answers import Asked, EngineError, excerpt, parse_completion, parse_scores
from rlx.rollout.sglang.image_request import KNOWS_FORM, NO_SUCH_FILE, PROBE
from rlx.types.rollout import FinishReason, SamplingSpec

_CONNECT_TIMEOUT_S = 10.0
_HEALTH_TIMEOUT_S = 10.0
_MAX_ABORTS_WITHOUT_TOKENS = 20


@dataclass(slots=True, kw_only=True)
class RolloutStats:
    """Counters since birth. ``requests`` were sent over HTTP; of those ``retries`` repeated a failed one and
    ``resubmissions`` continued an aborted answer. ``failures`` are sequences given up on. Tokens count good answers."""

    requests: int = 0
    retries: int = 0
    resubmissions: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    engines_set_aside: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with jitter: before retry n (from 0) wait U(0.5, 1) x min(base_s x 2^n, cap_s)."""

    max_retries: int = 3
    base_s: float = 0.25
    cap_s: float = 10.0

    async def run[T](self, attempt: Callable[[], Awaitable[T]], stats: RolloutStats) -> T:
        """The first good answer of ``attempt``; the last EngineError once it is final or retries are used up."""
        for retry in itertools.count():
            try:
                return await attempt()
            except EngineError as error:
                if retry >= self.max_retries or not error.retryable:
                    stats.failures += 1
                    error.add_note(f"given up after {retry + 1} attempts")
                    raise
            stats.retries += 1
            await asyncio.sleep(random.uniform(0.5, 1.0) * min(self.base_s * 2**retry, self.cap_s))
        raise AssertionError("unreachable")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, what: str = "token_ids") -> None:
    """Raise ValueError unless ``token_ids`` is a non-empty sequence of ints in [0, vocab_size)."""
    if not token_ids:
        raise ValueError(f"{what} is empty: an engine needs at least one token")
    if set(map(type, token_ids)) != {int}:  # bool is no token, and a set is quick on long prompts
        wrong = next(token for token in token_ids if type(token) is not int)
        raise ValueError(f"{what} must hold ints, found {wrong!r} of type {type(wrong).__name__}")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        index, wrong = next((i, token) for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        raise ValueError(f"{what}[{index}] is {wrong}; the engine's vocabulary is 0..{vocab_size - 1}")


def check_url(url: str) -> None:
    """Raise ValueError unless ``url`` can be an engine's."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"engine url {url!r} must start with http:// or https://")


class EngineClient:
    """Speaks to the engine at ``url``. Use and close it in one event loop.

    ``vocab_size`` bounds token ids in both directions. ``request_timeout_s`` limits one HTTP request from connecting
    to the last byte. Without ``session`` the client opens its own at first use and closes it in ``close``.
    """

    def __init__(
        self,
        url: str,
        request_timeout_s: float,
        api_key: str | None = None,
        *,
        vocab_size: int,
        session: aiohttp.ClientSession | None = None,
        stats: RolloutStats | None = None,
    ) -> None:
        check_url(url)
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        self.url = url.rstrip("/")
        self.vocab_size = vocab_size
        self.stats = RolloutStats() if stats is None else stats
        self.retry = RetryPolicy()
        self._timeout_s = request_timeout_s
        self._session = session
        self._owns_session = session is None
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._takes_images = self._sends_bytes = False
        self._asking = asyncio.Lock()
        # Fixed width: SGLang aborts by prefix, so that "a-1" would also hit "a-10".
        self._rids = (f"rlx-{uuid.uuid4().hex}-{count:012d}" for count in itertools.count())

    async def generate(
        self, token_ids: Sequence[int], sampling: SamplingSpec, seed: int, images: PlacedImages | None = None
    ) -> Completion:
        """One whole answer to ``token_ids`` under ``seed``: retried on failures, resubmitted after aborts.

        Raises ValueError for ids out of range, EngineError when the engine stays wrong.
        """
        check_token_ids(token_ids, self.vocab_size)

        async def part(ids: Sequence[int], spec: SamplingSpec) -> Completion:
            return await self.retry.run(lambda: self.attempt(ids, spec, seed, images), self.stats)

        return await complete(token_ids, sampling, part, self.stats)

    async def attempt(
        self, token_ids: Sequence[int], sampling: SamplingSpec, seed: int, images: PlacedImages | None = None
    ) -> Completion:
        """One request, no retry, ids unchecked. ``finish_reason`` "abort" marks a partial answer (it may be empty)."""
        payload = {
            "input_ids": list(token_ids),
            "sampling_params": sampling_params(sampling, seed),
            "return_logprob": True,
            "rid": next(self._rids),
        }
        answer = await self._generate(payload, images)
        completion = parse_completion(answer, self._asked(token_ids, images, sampling.max_new_tokens))
        self.stats.prompt_tokens += len(token_ids)
        self.stats.completion_tokens += len(completion.token_ids)
        return completion

    async def score(self, token_ids: Sequence[int], images: PlacedImages | None = None) -> list[float]:
        """Log-probs [L - 1] at temperature 1: entry i is that of token i + 1 given tokens 0..i; those of placeholders mean
        nothing. Errors as ``generate``."""
        check_token_ids(token_ids, self.vocab_size)
        spec = SamplingSpec(max_new_tokens=0)
        payload = {
            "input_ids": list(token_ids),
            "sampling_params": sampling_params(spec, 0),
            "return_logprob": True,
            "logprob_start_len": 0,
        }

        async def attempt() -> list[float]:
            return parse_scores(await self._generate(payload, images), self._asked(token_ids, images, 0))

        return await self.retry.run(attempt, self.stats)

    async def health(self) -> None:
        """Returns when the engine says it is well (it generates a token for that); else EngineError says why not."""
        await self._request("GET", "/health", None, min(self._timeout_s, _HEALTH_TIMEOUT_S))

    async def check_version(self, version: int) -> None:
        """EngineError unless the engine serves ``version``: one that was started again has its first weights."""
        info = json.loads(await self._request("GET", "/model_info", None, min(self._timeout_s, _HEALTH_TIMEOUT_S)))
        served = info.get("weight_version") if isinstance(info, dict) else None
        if served not in ("default", str(version)) or (served == "default" and version != 0):
            raise EngineError(self.url, f"serves weight version {served!r}, not {version}: it was started again")

    async def close(self) -> None:
        """Close the session if it is this client's own."""
        if self._owns_session and self._session is not None:
            await self._session.close()
            self._session = None

    def _asked(self, token_ids: Sequence[int], images: PlacedImages | None, max_new_tokens: int) -> Asked:
        places = frozenset() if images is None else images.places
        return Asked(url=self.url, token_ids=token_ids, vocab_size=self.vocab_size, max_new_tokens=max_new_tokens, places=places)

    async def _generate(self, payload: Mapping[str, object], images: PlacedImages | None) -> object:
        """Ask, images by their paths; from the first time on that the engine does not find a file, by their bytes."""
        if images is None:
            return await self._post("/generate", payload)
        async with self._asking:  # once, however many begin together
            if not self._takes_images:
                await self._check_images()
        if not self._sends_bytes:
            try:
                return await self._post("/generate", {**payload, "image_data": images.entries(as_data=False)})
            except EngineError as error:
                if NO_SUCH_FILE not in error.problem:
                    raise
            self._sends_bytes = True
        entries = await asyncio.to_thread(images.entries, as_data=True)
        return await self._post("/generate", {**payload, "image_data": entries})

    async def _check_images(self) -> None:
        """EngineError unless the engine takes images beside token ids as rlx sends them. Stock SGLang would read another prompt
        and say nothing."""
        probe = {"input_ids": [0], "image_data": [PROBE], "sampling_params": {"max_new_tokens": 1}}
        try:
            await self._post("/generate", probe)
            said = "an answer"
        except EngineError as error:
            if KNOWS_FORM in error.problem:
                self._takes_images = True
                return
            if error.status is None:
                raise
            said = error.problem
        raise EngineError(
            self.url,
            "does not take images as rlx sends them. A server of your own needs the package RUN_DIR/engines/modules/rlx_images on"
            " its PYTHONPATH, SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE=rlx_images and --disable-fast-image-processor. Asked whether"
            f" it has them, it said: {said}",
            retryable=False,
        )

    async def _post(self, path: str, payload: Mapping[str, object]) -> object:
        self.stats.requests += 1
        body = await self._request("POST", path, json.dumps(payload).encode(), self._timeout_s)
        try:
            answer: object = json.loads(body)
        except ValueError as error:
            raise EngineError(self.url, f"answer of {path} is not JSON ({error}): {excerpt(body)}") from error
        return answer

    async def _request(self, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
        if self._session is None:
            self._session = open_session()
        limit = aiohttp.ClientTimeout(total=timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
        url = self.url + path
        try:
            async with self._session.request(method, url, data=body, headers=self._headers, timeout=limit) as response:
                text = await response.read()
                status = response.status
        except aiohttp.ConnectionTimeoutError as error:
            raise EngineError(self.url, f"no connection for {path}: {error}") from error
        except TimeoutError as error:
            problem = f"no answer of {path} within the limit of {timeout_s:g} s"
            raise EngineError(self.url, problem, retryable=False, timed_out=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(self.url, f"connection failed at {path}: {type(error).__name__}: {error}") from error
        if status != 200:
            retryable = status >= 500 or status == 429
            problem = f"{path} answered HTTP {status}, expected 200: {excerpt(text)}"
            raise EngineError(self.url, problem, retryable=retryable, status=status)
        return text


def open_session() -> aiohttp.ClientSession:
    """A session without a connection limit: callers bound what is in flight. Must be called in a running loop."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def sampling_params(sampling: SamplingSpec, seed: int) -> dict[str, object]:
    """SGLang's ``sampling_params`` of one sample, everything explicit: servers take defaults from the model's folder."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "n": 1,
        "sampling_seed": seed,
    }


async def complete(
    token_ids: Sequence[int],
    sampling: SamplingSpec,
    part: Callable[[Sequence[int], SamplingSpec], Awaitable[Completion]],
    stats: RolloutStats,
) -> Completion:
    """Join the parts of one answer: after an abort ask ``part`` to go on from prompt + tokens so far with what is left
    of the budget. Every token keeps the log-prob and weight version under which it was written."""
    tokens: list[int] = []
    logprobs: list[float] = []
    versions: list[int] = []
    reason: FinishReason = "abort"
    fruitless = 0
    while reason == "abort":
        left = sampling.max_new_tokens - len(tokens)
        piece = await part([*token_ids, *tokens], replace(sampling, max_new_tokens=left))
        tokens += piece.token_ids
        logprobs += piece.rollout_logprobs
        versions += piece.weight_versions
        reason = piece.finish_reason
        if reason != "abort":
            break
        if tokens and tokens[-1] in sampling.stop_token_ids:
            reason = "stop"
        elif len(tokens) >= sampling.max_new_tokens:
            reason = "length"
        else:
            fruitless = 0 if piece.token_ids else fruitless + 1
            if fruitless > _MAX_ABORTS_WITHOUT_TOKENS:
                raise EngineError("engines", f"aborted one sequence {fruitless} times in a row without a new token")
            stats.resubmissions += 1
            await asyncio.sleep(0.05 * fruitless)
    return Completion(
        token_ids=tuple(tokens), rollout_logprobs=tuple(logprobs), finish_reason=reason, weight_versions=tuple(versions)
    )
