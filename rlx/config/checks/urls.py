"""What a URL of a server is."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def is_url(text: str) -> bool:
    """Whether ``text`` names a server of HTTP: scheme, host and, if any, a port that there can be."""
    try:
        parts = urlsplit(text)
        port = parts.port  # ValueError for what is no port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not re.search(r"\s", text)
