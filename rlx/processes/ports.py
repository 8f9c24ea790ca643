"""Ports that are free."""

from __future__ import annotations

import random
import socket

_LAST = 65535
_TRIES = 1000


def free_port(host: str = "127.0.0.1", *, room_above: int = 0) -> int:
    """A port that nobody listens on now, at most 65535 - ``room_above``. Somebody may take it before it is used: whoever asks
    must be ready for that."""
    port = _bound(host, 0)
    for _ in range(_TRIES):
        if port is not None and port <= _LAST - room_above:
            return port
        port = _bound(host, random.randint(1024, _LAST - room_above))  # all that the system chooses from may lie too high
    raise OSError(f"no free port up to {_LAST - room_above} on {host}")


def _bound(host: str, port: int) -> int | None:
    """``port``, if it can be had; 0 lets the system choose."""
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            if port == 0:
                raise
            return None
        return int(probe.getsockname()[1])
