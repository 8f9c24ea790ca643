"""One engine over HTTP: SGLang's ``/generate`` with token ids in and token ids out, checked strictly both ways.

This file knows one server and one sequence at a time; it does not know groups, several engines or weight updates
(``router`` and ``generate`` build on it). What it refuses: ids the engine cannot hold (stock SGLang exits on one) and
answers whose parts do not agree.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import aiohttp

from rlx.rollout.completion import Completion
from rlx.types.rollout import FinishReason, SamplingSpec

# A sampled token's log-prob is at most 0; this much above it is rounding in low precision, more is a broken engine.
_LOGPROB_SLACK = 1e-2
_CONNECT_TIMEOUT_S = 10.0
_HEALTH_TIMEOUT_S = 10.0
_MAX_ABORTS_WITHOUT_TOKENS = 20


class EngineError(RuntimeError):
    """An engine failed or answered wrongly. ``retryable``: asking again may help; ``timed_out``: it hit the time limit."""

    def __init__(self, url: str, problem: str, *, retryable: bool = True, timed_out: bool = False) -> None:
        super().__init__(f"{url}: {problem}")
        self.url = url
        self.problem = problem
        self.retryable = retryable
        self.timed_out = timed_out


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
        # Fixed width: SGLang aborts by prefix, so that "a-1" would also hit "a-10".
        self._rids = (f"rlx-{uuid.uuid4().hex}-{count:012d}" for count in itertools.count())

    async def generate(self, token_ids: Sequence[int], sampling: SamplingSpec, seed: int) -> Completion:
        """One whole answer to ``token_ids`` under ``seed``: retried on failures, resubmitted after aborts.

        Raises ValueError for ids out of range, EngineError when the engine stays wrong.
        """
        check_token_ids(token_ids, self.vocab_size)

        async def part(ids: Sequence[int], spec: SamplingSpec) -> Completion:
            return await self.retry.run(lambda: self.attempt(ids, spec, seed), self.stats)

        return await complete(token_ids, sampling, part, self.stats)

    async def attempt(self, token_ids: Sequence[int], sampling: SamplingSpec, seed: int) -> Completion:
        """One request, no retry, ids unchecked. ``finish_reason`` "abort" marks a partial answer (it may be empty)."""
        payload = {
            "input_ids": list(token_ids),
            "sampling_params": sampling_params(sampling, seed),
            "return_logprob": True,
            "rid": next(self._rids),
        }
        answer = await self._post("/generate", payload)
        completion = parse_completion(answer, self.url, self.vocab_size, sampling.max_new_tokens)
        self.stats.prompt_tokens += len(token_ids)
        self.stats.completion_tokens += len(completion.token_ids)
        return completion

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs [L - 1] at temperature 1: entry i is that of token i + 1 given tokens 0..i. Errors as ``generate``."""
        check_token_ids(token_ids, self.vocab_size)
        spec = SamplingSpec(max_new_tokens=0)
        payload = {
            "input_ids": list(token_ids),
            "sampling_params": sampling_params(spec, 0),
            "return_logprob": True,
            "logprob_start_len": 0,
        }

        async def attempt() -> list[float]:
            return parse_scores(await self._post("/generate", payload), self.url, token_ids, self.vocab_size)

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

    async def _post(self, path: str, payload: Mapping[str, object]) -> object:
        self.stats.requests += 1
        body = await self._request("POST", path, json.dumps(payload).encode(), self._timeout_s)
        try:
            answer: object = json.loads(body)
        except ValueError as error:
            raise EngineError(self.url, f"answer of {path} is not JSON ({error}): {_excerpt(body)}") from error
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
            raise EngineError(self.url, f"{path} answered HTTP {status}, expected 200: {_excerpt(text)}", retryable=retryable)
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


def parse_completion(answer: object, url: str, vocab_size: int, max_new_tokens: int) -> Completion:
    """Check a ``/generate`` answer and turn it into a Completion; EngineError names the field and what was expected."""
    top = _mapping(answer, "answer", url)
    meta = _mapping(top.get("meta_info"), "meta_info", url)
    reason = _finish_reason(meta, url)
    empty: list[object] | None = [] if reason == "abort" else None  # aborted while queued: SGLang leaves the lists out
    ids = _list(top.get("output_ids", empty), "output_ids", url)
    if not ids and reason != "abort":
        raise EngineError(url, f"output_ids is empty, expected at least one token with finish reason {reason!r}")
    if len(ids) > max_new_tokens:
        raise EngineError(url, f"output_ids has {len(ids)} tokens, expected at most max_new_tokens = {max_new_tokens}")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise EngineError(url, f"output_ids holds {token!r}, expected an int in 0..{vocab_size - 1}")
    logprobs = _logprobs(meta.get("output_token_logprobs", [] if not ids else None), "output_token_logprobs", url, ids)
    versions = _weight_versions(meta, url, len(ids))
    return Completion(token_ids=tuple(ids), rollout_logprobs=logprobs, finish_reason=reason, weight_versions=versions)


def parse_scores(answer: object, url: str, token_ids: Sequence[int], vocab_size: int) -> list[float]:
    """Log-probs of tokens 1..L-1 out of a scoring answer; the entry of token 0 is null and dropped."""
    meta = _mapping(_mapping(answer, "answer", url).get("meta_info"), "meta_info", url)
    if _finish_reason(meta, url) == "abort":
        raise EngineError(url, "meta_info.finish_reason is abort, expected a finished scoring request")
    entries = _list(meta.get("input_token_logprobs"), "meta_info.input_token_logprobs", url)
    if len(entries) != len(token_ids):
        problem = f"meta_info.input_token_logprobs has {len(entries)} entries, expected one a token, {len(token_ids)}"
        raise EngineError(url, problem)
    # SGLang echoes the vocabulary's last id as 0 here, beside the right log-prob.
    rows: list[object] = list(entries)
    ids = [
        0 if token == vocab_size - 1 and isinstance(row, list) and row[1:2] == [0] else token
        for row, token in zip(rows, token_ids, strict=True)
    ]
    return list(_logprobs(entries[1:], "input_token_logprobs", url, ids[1:]))


def _logprobs(value: object, name: str, url: str, ids: Sequence[int]) -> tuple[float, ...]:
    """The numbers of [[logprob, id, text], ...], which must be finite and belong to ``ids``."""
    name = f"meta_info.{name}"
    entries = _list(value, name, url)
    if len(entries) != len(ids):
        raise EngineError(url, f"{name} has {len(entries)} entries, expected {len(ids)}, one a token")
    found: list[float] = []
    for index, (entry, token) in enumerate(zip(entries, ids, strict=True)):
        if not isinstance(entry, list) or len(entry) < 2 or type(entry[1]) is not int or entry[1] != token:
            raise EngineError(url, f"{name}[{index}] is {entry!r}, expected [logprob, {token}, ...]")
        logprob = entry[0]
        if type(logprob) not in (float, int) or not math.isfinite(logprob) or logprob > _LOGPROB_SLACK:
            raise EngineError(url, f"{name}[{index}] has log-prob {logprob!r}, expected a finite number that is not positive")
        found.append(float(logprob))
    return tuple(found)


def _finish_reason(meta: Mapping[str, object], url: str) -> FinishReason:
    reason = _mapping(meta.get("finish_reason"), "meta_info.finish_reason", url)
    kind = reason.get("type")
    if kind == "stop":
        return "stop"
    if kind == "length":
        return "length"
    if kind != "abort":
        raise EngineError(url, f"meta_info.finish_reason.type is {kind!r}, expected stop, length or abort")
    status = reason.get("status_code")
    if status is not None:  # an error in the shape of an abort, not a pause
        client_fault = isinstance(status, int) and 400 <= status < 500
        raise EngineError(url, f"request aborted with status {status}: {reason.get('message')}", retryable=not client_fault)
    return "abort"


def _weight_versions(meta: Mapping[str, object], url: str, num_tokens: int) -> tuple[int, ...]:
    """The weights that wrote each token: today's SGLang lists the stretches of an answer, others name one version for all."""
    if "weight_versions" not in meta:
        return (_weight_version(meta, "weight_version", url),) * num_tokens if num_tokens else ()
    name = "meta_info.weight_versions"
    found: list[int] = []
    for index, entry in enumerate(_list(meta["weight_versions"], name, url)):
        span = _mapping(entry, f"{name}[{index}]", url)
        start, end = span.get("start"), span.get("end")
        if start != len(found) or type(end) is not int or not start <= end <= num_tokens:
            expected = f"a stretch that begins at {len(found)} and ends by {num_tokens}"
            raise EngineError(url, f"{name}[{index}] is {entry!r}, expected {expected}")
        found += [_weight_version(span, "version", url)] * (end - start)
    if len(found) != num_tokens:
        raise EngineError(url, f"{name} tells of {len(found)} tokens, expected {num_tokens}")
    return tuple(found)


def _weight_version(owner: Mapping[str, object], name: str, url: str) -> int:
    value = owner.get(name)
    if value == "default":
        return 0
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    raise EngineError(url, f'{name} is {value!r}, expected "default" or digits in a string')


def _mapping(value: object, name: str, url: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise EngineError(url, f"{name} is {_excerpt(repr(value).encode())}, expected an object")
    return value


def _list(value: object, name: str, url: str) -> list[int]:
    """``value`` as a list; its elements are checked by the caller."""
    if not isinstance(value, list):
        raise EngineError(url, f"{name} is {_excerpt(repr(value).encode())}, expected a list")
    return value


def _excerpt(body: bytes) -> str:
    text = body[:300].decode(errors="replace").strip()
    return f"{text} ..." if len(body) > 300 else text or "(empty)"
