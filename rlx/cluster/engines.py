"""From engine processes to a file of endpoints that the trainers wait for."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rlx.cluster.causes import Cause, tail
from rlx.cluster.processes import Child
from rlx.cluster.supervisor import now_text
from rlx.obs.log import Phase
from rlx.rollout.server import parse_ready_port, wait_until_healthy

_POLL_S = 0.1


def write_endpoints(path: Path, urls: Sequence[str]) -> None:
    """A JSON list of URLs; whoever sees the file sees all of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(list(urls)) + "\n")
    os.replace(partial, path)


class EngineStart:
    """Waits in threads of its own, one an engine, for each engine's port and health, then writes the endpoints once.

    Consumes the engines' logs; ends when all are healthy, one failed, one ended or ``cancel`` was called.
    """

    def __init__(self, engines: Sequence[Child], path: Path, *, timeout_s: float, host: str = "127.0.0.1") -> None:
        self._engines = tuple(engines)
        self._path = path
        self._timeout_s = timeout_s
        self._host = host
        self._cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(engines)), thread_name_prefix="engine-start")
        self._urls: list[Future[str]] = [self._pool.submit(self._wait, engine) for engine in engines]
        self._written = False

    def serving(self) -> bool:
        """True once all engines were healthy; writes the endpoints the first time."""
        if not self._written and all(url.done() and url.exception() is None for url in self._urls):
            write_endpoints(self._path, [url.result() for url in self._urls])
            self._written = True
        return self._written

    def failed(self) -> Cause | None:
        """The engine that did not become healthy, if any."""
        for engine, url in zip(self._engines, self._urls, strict=True):
            error = url.exception() if url.done() else None
            if error is not None:
                first_line = (str(error).splitlines() or [""])[0].removesuffix(
                    "; last lines of its log:"
                )  # the log is shown apart
                return Cause(
                    role=engine.spec.role,
                    rank=engine.spec.rank,
                    phase=Phase(name="start engine"),
                    cause=f"{type(error).__name__}: {first_line}",
                    log_path=engine.spec.log_path,
                    when=now_text(),
                )
        return None

    def cancel(self) -> None:
        """Stop waiting."""
        self._cancelled.set()
        self._pool.shutdown(wait=True)

    def _wait(self, engine: Child) -> str:
        deadline = time.monotonic() + self._timeout_s
        alive = self._alive(engine)
        while (port := _reported_port(engine)) is None:
            if not alive():
                raise RuntimeError("the engine process ended before it reported its port")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the engine reported no port within {self._timeout_s:g} s (rollout.start_timeout_s)")
            time.sleep(_POLL_S)
        url = f"http://{self._host}:{port}"
        left = max(0.1, deadline - time.monotonic())
        wait_until_healthy(url, left, alive, lambda: tail(engine.log_text(), 20))
        return url

    def _alive(self, engine: Child) -> Callable[[], bool]:
        return lambda: engine.poll() is None and not self._cancelled.is_set()


def _reported_port(engine: Child) -> int | None:
    for line in engine.log_text().splitlines():
        port = parse_ready_port(line)
        if port is not None:
            return port
    return None
