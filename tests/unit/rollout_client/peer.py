"""A peer that speaks the ``/generate`` JSON over real sockets and can be told to misbehave.

Its tokens are a pure function of (sequence so far, seed), so that a test can compute the right answer on its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

VOCAB = 211
Answer = dict[str, Any]
Behaviour = Callable[["Peer", Answer], Awaitable[web.StreamResponse | Answer | None]]


def draw(sequence: list[int], seed: int) -> tuple[int, float]:
    """The next token and its log-prob after ``sequence``."""
    digest = hashlib.sha256(json.dumps([sequence, seed]).encode()).digest()
    return digest[0] % VOCAB, -(int.from_bytes(digest[1:9], "little") + 1) / 2.0**64 * 9.0


def expected(prompt: tuple[int, ...], seed: int, count: int, stops: tuple[int, ...] = ()) -> tuple[list[int], list[float]]:
    """What an answer must hold: an independent loop over ``draw``."""
    tokens: list[int] = []
    logprobs: list[float] = []
    for _ in range(count):
        token, logprob = draw([*prompt, *tokens], seed)
        tokens.append(token)
        logprobs.append(logprob)
        if token in stops:
            break
    return tokens, logprobs


def answer_to(payload: Answer, version: str = "default", abort_after: int | None = None) -> Answer:
    """A right answer to a request; ``abort_after`` tokens it is aborted."""
    prompt, params = tuple(payload["input_ids"]), payload["sampling_params"]
    count = params["max_new_tokens"]
    stops = tuple(params["stop_token_ids"])
    tokens, logprobs = expected(prompt, params["sampling_seed"], count, stops)
    reason: Answer = {"type": "length", "length": count}
    if tokens and tokens[-1] in stops:
        reason = {"type": "stop", "matched": tokens[-1]}
    if abort_after is not None and abort_after < len(tokens):
        tokens, logprobs = tokens[:abort_after], logprobs[:abort_after]
        reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    meta = {
        "id": payload.get("rid"),
        "finish_reason": reason,
        "prompt_tokens": len(prompt),
        "weight_version": version,
        "completion_tokens": len(tokens),
        "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, tokens, strict=True)],
    }
    if "logprob_start_len" in payload:
        scored = [[draw(list(prompt[:i]), 0)[1], prompt[i], None] for i in range(1, len(prompt))]
        meta["input_token_logprobs"] = [[None, prompt[0], None], *scored]
    return {"output_ids": tokens, "meta_info": meta}


class Peer:
    """A server on a port of the system's choice in a thread of its own. ``behaviour`` gets each payload and returns an
    answer (dict), a response, or None to drop the connection. ``seen`` holds the payloads in order of arrival."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour
        self.seen: list[Answer] = []
        self.headers: list[dict[str, str]] = []
        self.active = 0
        self.most_active = 0
        self.disconnects = 0
        self.healthy = True
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="test-peer")
        self._thread.start()
        assert self._ready.wait(20)
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/health", self._health)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        payload = await request.json()
        self.seen.append(payload)
        self.headers.append(dict(request.headers))
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            result = answer_to(payload) if self.behaviour is None else await self.behaviour(self, payload)
        except asyncio.CancelledError:
            self.disconnects += 1
            raise
        finally:
            self.active -= 1
        if result is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return web.json_response(result) if isinstance(result, dict) else result
