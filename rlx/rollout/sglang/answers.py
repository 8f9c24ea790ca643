"""Answers of ``/generate``, checked strictly: whatever does not fit the request or itself is an EngineError that names the field.

Pure; knows no HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from rlx.rollout.completion import Completion
from rlx.types.rollout import FinishReason

# A sampled token's log-prob is at most 0; this much above it is rounding in low precision, more is a broken engine.
_LOGPROB_SLACK = 1e-2


class EngineError(RuntimeError):
    """An engine failed or answered wrongly. ``retryable``: asking again may help; ``timed_out``: it hit the time limit;
    ``status``: of an answer that was not HTTP 200."""

    def __init__(
        self, url: str, problem: str, *, retryable: bool = True, timed_out: bool = False, status: int | None = None
    ) -> None:
        super().__init__(f"{url}: {problem}")
        self.url = url
        self.problem = problem
        self.retryable = retryable
        self.timed_out = timed_out
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The request that an answer must fit. ``places``: the tokens that stand for images."""

    url: str
    token_ids: Sequence[int]
    vocab_size: int
    max_new_tokens: int = 0
    places: AbstractSet[int] = frozenset()


def parse_completion(answer: object, asked: Asked) -> Completion:
    """Check a ``/generate`` answer and turn it into a Completion; EngineError names the field and what was expected."""
    url, vocab_size, max_new_tokens = asked.url, asked.vocab_size, asked.max_new_tokens
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
    if ids or reason != "abort":
        _check_prompt(meta, asked)
    logprobs = _logprobs(meta.get("output_token_logprobs", [] if not ids else None), "output_token_logprobs", url, ids)
    versions = _weight_versions(meta, url, len(ids))
    return Completion(token_ids=tuple(ids), rollout_logprobs=logprobs, finish_reason=reason, weight_versions=versions)


def parse_scores(answer: object, asked: Asked) -> list[float]:
    """Log-probs of tokens 1..L-1 out of a scoring answer; the entry of token 0 is null and dropped."""
    url, token_ids = asked.url, asked.token_ids
    meta = _mapping(_mapping(answer, "answer", url).get("meta_info"), "meta_info", url)
    if _finish_reason(meta, url) == "abort":
        raise EngineError(url, "meta_info.finish_reason is abort, expected a finished scoring request")
    _check_prompt(meta, asked)
    entries = _list(meta.get("input_token_logprobs"), "meta_info.input_token_logprobs", url)
    if len(entries) != len(token_ids):
        problem = f"meta_info.input_token_logprobs has {len(entries)} entries, expected one a token, {len(token_ids)}"
        raise EngineError(url, problem)
    # SGLang echoes the vocabulary's last id as 0 here, beside the right log-prob, and the placeholders of images as well.
    rows: list[object] = list(entries)
    ids = [
        0 if (token == asked.vocab_size - 1 or place in asked.places) and isinstance(row, list) and row[1:2] == [0] else token
        for place, (row, token) in enumerate(zip(rows, token_ids, strict=True))
    ]
    return list(_logprobs(entries[1:], "input_token_logprobs", url, ids[1:]))


def _check_prompt(meta: Mapping[str, object], asked: Asked) -> None:
    """A server that tokenises anew, or leaves an image out, answers as if nothing were wrong; only this count tells."""
    count = meta.get("prompt_tokens")
    if count != len(asked.token_ids):
        problem = f"meta_info.prompt_tokens is {count!r}, but {len(asked.token_ids)} tokens were sent: it read another prompt"
        raise EngineError(asked.url, problem, retryable=False)


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
        raise EngineError(url, f"{name} is {excerpt(repr(value).encode())}, expected an object")
    return value


def _list(value: object, name: str, url: str) -> list[int]:
    """``value`` as a list; its elements are checked by the caller."""
    if not isinstance(value, list):
        raise EngineError(url, f"{name} is {excerpt(repr(value).encode())}, expected a list")
    return value


def excerpt(body: bytes) -> str:
    """The beginning of what a server said."""
    text = body[:300].decode(errors="replace").strip()
    return f"{text} ..." if len(body) > 300 else text or "(empty)"
