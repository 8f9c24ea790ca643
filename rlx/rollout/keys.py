"""The two secrets of a run's engines: one for asking, one for changing them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

# What the api key opens; everything else that changes or stops an engine needs the admin key.
ASKING_PATHS = frozenset({"/generate", "/classify", "/model_info", "/server_info", "/health", "/v1/models"})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKeys:
    """Bearer tokens; None where an engine asks for none. Kept out of every repr, so that no log line shows them."""

    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)

    def headers(self, path: str) -> dict[str, str]:
        """The header that opens ``path``: SGLang refuses each key where the other one belongs."""
        key = self.api_key if path in ASKING_PATHS else self.admin_key
        return {} if key is None else {"Authorization": f"Bearer {key}"}


def new_keys() -> EngineKeys:
    """Fresh keys of 256 random bits each, in hex: one that began with a dash would read as a command-line option."""
    return EngineKeys(api_key=secrets.token_hex(32), admin_key=secrets.token_hex(32))
