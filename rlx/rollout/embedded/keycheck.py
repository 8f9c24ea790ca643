"""Who may ask what, as SGLang does it: health is open, asking needs the api key, changing anything the admin key."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rlx.rollout.keys import EngineKeys

_OPEN_PATHS = ("/health", "/health_generate")


class KeyCheck:
    """ASGI middleware: answers 401 to a request that does not show the key of its path."""

    def __init__(self, app: ASGIApp, keys: EngineKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            wanted = self._keys.headers(scope["path"]).get("Authorization")
            shown = Headers(scope=scope).get("authorization", "")
            if wanted is not None and not hmac.compare_digest(wanted.encode(), shown.encode()):
                await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)
