"""Pickled messages over a socket, for a thread that must never wait for the process at the other end.

A frame is its length (8 bytes, network order) and a pickle. ``post`` and ``collect`` never block, whatever the other end does:
what it does not read yet stays here. ``send`` and ``receive`` block; they are for the process that has nothing else to do.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlx.types.rollout import Reward

_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """A judge's message: what it has found since it last wrote, by number of the answer, and how long it took."""

    rewards: Sequence[tuple[int, Reward]]
    seconds: float


class Channel:
    """One end. ``collect`` and ``receive`` raise EOFError once the other end is closed (or OSError, if it broke)."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._inbox, self._outbox = bytearray(), bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_mail(self) -> bool:
        """Whether something posted has not left yet; ``flush`` when the socket can be written to."""
        return bool(self._outbox)

    def post(self, message: Any) -> None:
        """Send when the other end reads. Raises what pickling raises, and nothing when the other end is gone."""
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._outbox += _LENGTH.pack(len(payload)) + payload
        self.flush()

    def flush(self) -> None:
        """Write as much as fits."""
        # A broken pipe is found by reading: what the other end wrote before it went comes first.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._outbox:
                del self._outbox[: self._socket.send(self._outbox, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)]

    def collect(self) -> list[Any]:
        """The messages that have come."""
        with contextlib.suppress(BlockingIOError):
            while data := self._socket.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT):
                self._inbox += data
                if len(data) < _CHUNK_BYTES:
                    return self._whole_frames()
            if not self._inbox:
                raise EOFError
        return self._whole_frames()

    def send(self, message: Any) -> None:
        """Send, waiting for the other end to read."""
        payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self._socket.sendall(_LENGTH.pack(len(payload)) + payload)

    def receive(self) -> Any:
        """The next message."""
        return pickle.loads(self._exactly(_LENGTH.unpack(self._exactly(_LENGTH.size))[0]))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, num_bytes: int) -> bytearray:
        data = bytearray()
        while len(data) < num_bytes:
            more = self._socket.recv(min(num_bytes - len(data), _CHUNK_BYTES))
            if not more:
                raise EOFError
            data += more
        return data

    def _whole_frames(self) -> list[Any]:
        messages, start = [], 0
        while len(self._inbox) - start >= _LENGTH.size:
            end = start + _LENGTH.size + _LENGTH.unpack_from(self._inbox, start)[0]
            if end > len(self._inbox):
                break
            messages.append(pickle.loads(memoryview(self._inbox)[start + _LENGTH.size : end]))
            start = end
        del self._inbox[:start]
        return messages
