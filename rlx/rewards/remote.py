"""Asking a server for verdicts: requests that are gathered, retried and checked. Used by ``http``, ``model`` and ``judge``.

Who waits for whom: a verdict thread puts its question in the batch that is open and waits; the first of a batch waits
``max_wait_s`` for others (or until the batch is full), sends it and hands the answers out.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from rlx.config.checks.urls import is_url


class RemoteError(RuntimeError):
    """The server refused, failed or answered nonsense, after all retries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Poster:
    """Posts JSON to ``url``; retries on connection errors, time-outs, 429 and 5xx with doubling pauses."""

    url: str
    timeout_s: float = 30.0
    max_retries: int = 3
    pause_s: float = 0.5
    api_key_file: str | None = None
    client: httpx.Client = field(default_factory=lambda: httpx.Client(trust_env=False))

    def __post_init__(self) -> None:
        if not is_url(self.url):
            raise ValueError(f"reward.args.url must be a URL such as http://host:8000/score, got {self.url!r}")
        if self.api_key_file is not None:
            if not os.path.isfile(self.api_key_file):
                raise ValueError(f"reward.args.api_key_file: no such file {self.api_key_file}")
            self.client.headers["Authorization"] = f"Bearer {Path(self.api_key_file).read_text().strip()}"

    def post(self, body: Mapping[str, Any]) -> Any:
        """The decoded answer; RemoteError names the URL and the last cause."""
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1))
            try:
                response = self.client.post(self.url, json=body, timeout=self.timeout_s)
            except httpx.HTTPError as error:
                cause = f"{type(error).__name__}: {error}"
                continue
            cause = f"HTTP {response.status_code}: {response.text[:200]}"
            if response.status_code == 200:
                try:
                    return response.json()
                except ValueError as error:
                    raise RemoteError(f"{self.url}: the answer is not JSON: {error}") from error
            if response.status_code != 429 and response.status_code < 500:
                break
        raise RemoteError(f"{self.url}: {cause}")


@dataclass(slots=True, eq=False)
class _Batch[Question]:
    questions: list[Question] = field(default_factory=list)
    full: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    answers: Sequence[float] = ()
    error: Exception | None = None


class Batcher[Question]:
    """Gathers questions of several threads; ``ask_all`` takes a list and returns one number each, in order."""

    def __init__(self, ask_all: Callable[[Sequence[Question]], Sequence[float]], max_size: int, max_wait_s: float) -> None:
        if max_size < 1:
            raise ValueError(f"reward.args.batch_size must be at least 1, got {max_size}")
        self._ask_all, self._max_size, self._max_wait_s = ask_all, max_size, max_wait_s
        self._lock = threading.Lock()
        self._open: _Batch[Question] | None = None

    def ask(self, question: Question) -> float:
        """The answer to one question; raises what ``ask_all`` raised for its batch."""
        with self._lock:
            batch, is_first = self._open, self._open is None
            if batch is None:
                batch = self._open = _Batch()
            index = len(batch.questions)
            batch.questions.append(question)
            if len(batch.questions) >= self._max_size:
                self._open = None
                batch.full.set()
        if is_first:
            batch.full.wait(self._max_wait_s)
            self._send(batch)
        batch.done.wait()
        if batch.error is not None:
            raise batch.error
        return batch.answers[index]

    def _send(self, batch: _Batch[Question]) -> None:
        with self._lock:
            if self._open is batch:
                self._open = None
        try:
            batch.answers = self._ask_all(batch.questions)
            if len(batch.answers) != len(batch.questions):
                raise RemoteError(f"{len(batch.questions)} questions but {len(batch.answers)} answers")
        except Exception as error:
            # It belongs to every thread that waits for this batch.
            batch.error = error
        finally:
            batch.done.set()
