"""A hub on this machine: the part of the Hugging Face hub's HTTP protocol that its client uses for downloads."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit

Repos = Mapping[tuple[str, str, str], Mapping[str, bytes]]


class HubServer:
    """Serves ``repos``: the files of (kind, id, revision), kind being ``models`` or ``datasets``. ``requests``: the paths asked
    for."""

    def __init__(self, repos: Repos) -> None:
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, with_body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(path)
                body, headers = answer(repos, path)
                self.send_response(404 if body is None else 200)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                if with_body and body:
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def commit_of(kind: str, name: str, revision: str) -> str:
    return hashlib.sha1(f"{kind} {name} {revision}".encode()).hexdigest()


def answer(repos: Repos, path: str) -> tuple[bytes | None, dict[str, str]]:
    """Body (None: not found) and headers."""
    for (kind, name, revision), files in repos.items():
        commit = commit_of(kind, name, revision)
        named = {f"/api/{kind}/{name}/revision/{one}": None for one in (revision, commit)}
        if path in named or (path == f"/api/{kind}/{name}" and revision == "main"):
            return json.dumps({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}).encode(), {}
        if path.startswith(f"/api/{kind}/{name}/tree/{commit}"):
            rows = [{"type": "file", "path": file, "size": len(text), "oid": etag(text)} for file, text in files.items()]
            return json.dumps(rows).encode(), {}
        home = f"/{name}/resolve/{commit}/" if kind == "models" else f"/{kind}/{name}/resolve/{commit}/"
        text = files.get(path.removeprefix(home)) if path.startswith(home) else None
        if text is not None:
            return text, {"ETag": f'"{etag(text)}"', "X-Repo-Commit": commit}
    is_known = any(path.startswith(f"/api/{kind}/{name}") for kind, name, _ in repos)
    return None, {"X-Error-Code": "RevisionNotFound" if is_known else "RepoNotFound"}


def etag(text: bytes) -> str:
    return hashlib.sha1(text).hexdigest()
