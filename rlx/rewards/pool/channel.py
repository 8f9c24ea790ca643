"""Pickled messages over a socket, between a process and the one that it was forked for.

A frame is its length (8 bytes, network order) and a pickle. The ends take turns: who has sent a message waits for the answer.
"""

from __future__ import annotations

import pickle
import select
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 2**18


def frame(message: Any) -> bytes:
    """What ``Channel.write`` takes. Raises what pickling raises."""
    payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(payload)) + payload


class Channel:
    """One end. Writing, and waiting for each part of an answer, raises TimeoutError after ``timeout_s`` (None: never). Once the
    other end is closed they raise EOFError, or another OSError if it broke."""

    def __init__(self, sock: socket.socket, timeout_s: float | None = None) -> None:
        self._socket = sock
        self._socket.settimeout(timeout_s)

    def write(self, data: bytes) -> None:
        """Send a frame."""
        self._socket.sendall(data)

    def send(self, message: Any) -> None:
        """Send a message, waiting for the other end to read."""
        self.write(frame(message))

    def receive(self) -> Any:
        """The next message."""
        data, size = bytearray(), _LENGTH.size
        while len(data) < size or len(data) < (size := _LENGTH.size + _LENGTH.unpack_from(data)[0]):
            more = self._socket.recv(_CHUNK_BYTES)
            if not more:
                raise EOFError
            data += more
        return pickle.loads(memoryview(data)[_LENGTH.size : size])

    @property
    def is_open(self) -> bool:
        """Whether the other end is there, which has nothing to say now."""
        return not select.select([self._socket], [], [], 0)[0]

    def close(self) -> None:
        self._socket.close()
