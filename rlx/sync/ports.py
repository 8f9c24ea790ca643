"""Ports that are free."""

from __future__ import annotations

import random
import socket

_FIRST = 20_000  # Ray gives its workers those below
_LAST = 65_535
# Linux draws from 32768 up for connections that leave, and Kubernetes' services begin at 30000: a port below both is not taken
# by chance between now and its use.
_BELOW = 30_000
_TRIES = 1000


def free_port(host: str = "127.0.0.1", *, room_above: int = 0) -> int:
    """A port that nobody listens on now, at most 65535 - ``room_above``; ``host`` "" is every interface.

    Somebody may take it before it is used: whoever asks must be ready for that.
    """
    for attempt in range(_TRIES):
        most = min(_BELOW if attempt < _TRIES // 2 else _LAST, _LAST - room_above)
        port = random.SystemRandom().randint(_FIRST, most)  # seeded runs would all draw the same
        if _is_free(host, port):
            return port
    raise OSError(f"no free port up to {_LAST - room_above} on {host or 'any interface'}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
