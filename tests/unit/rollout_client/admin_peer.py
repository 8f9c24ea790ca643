"""A server with SGLang's admin side: what releases differ in can be chosen, and what was asked is written down.

Keys as SGLang has them: a path that it does not know, or is asked in the wrong way, belongs to the api key.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlx.rollout.keys import EngineKeys

SESSION_PATHS = ("/begin_weight_update", "/end_weight_update")
ADMIN_PATHS = (
    *("/pause_generation", "/continue_generation", "/flush_cache"),
    *("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_distributed", "/weights_checker"),
)


class AdminPeer:
    """``sessions``: weights are taken inside a session only; ``flushes_paused``: requests held by a pause do not keep the cache
    from being flushed. ``busy`` requests run until they are aborted, ``immortal`` ones go on."""

    def __init__(self, *, sessions: bool, flushes_paused: bool, keys: EngineKeys) -> None:
        self.sessions, self.flushes_paused, self.keys = sessions, flushes_paused, keys
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.session_open = False
        self.pause_mode: str | None = None
        self.busy = self.immortal = 0
        self.checksums: list[dict[str, str]] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"peer": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def answer(self, method: str, path: str, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        paths = ADMIN_PATHS + (SESSION_PATHS if self.sessions else ())
        known = path in paths and method == "POST"
        if key != f"Bearer {self.keys.admin_key if known else self.keys.api_key}":
            return 401, {"error": "Unauthorized"}
        if not known:
            return (405 if path in paths else 404), {"detail": "no"}
        self.calls.append((path, body))
        problem = self._problem(path, body)
        version = body.get("weight_version")
        message = problem or (f"Success Weight version updated to {version}." if version else "Success")
        answer: dict[str, Any] = {"success": problem is None, "message": message}
        if path == "/weights_checker" and self.checksums is not None:
            answer["ranks"] = [{"checksums": sums} for sums in self.checksums]
        return (200 if problem is None else 400), answer

    def _problem(self, path: str, body: dict[str, Any]) -> str | None:
        if path == "/begin_weight_update":
            if self.session_open:
                return "a weight-update session is already open"
            self.session_open = True
        elif path == "/end_weight_update":
            if not self.session_open:
                return "no weight-update session is open"
            self.session_open = False
        elif path.startswith("/update_weights") and not path.endswith("disk") and self.sessions and not self.session_open:
            return "must run between begin_weight_update() and end_weight_update()"
        elif path == "/pause_generation":
            self.pause_mode = body["mode"]
            self.busy = self.immortal if self.pause_mode == "abort" else self.busy
        elif path == "/weights_checker" and self.checksums is None:
            return "Found no NVIDIA driver on your system"
        elif path == "/flush_cache" and self.busy and not (self.flushes_paused and self.pause_mode == "retract"):
            return "pending requests"
        return None


class _Handler(BaseHTTPRequestHandler):
    peer: AdminPeer

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, *arguments: object) -> None:
        """Nobody reads it."""

    def _answer(self, method: str) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(raw) if raw else {}
        status, answer = self.peer.answer(method, self.path, self.headers.get("Authorization", ""), body)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
