"""One connection between the driver and a trainer rank: who speaks is proved, then whole messages go both ways.

A message is pickled with its large buffers beside it (PEP 574), so that arrays are neither copied into the pickle nor out of
it. Nothing is unpickled before the other side has shown that it knows the run's secret.
"""

from __future__ import annotations

import hmac
import pickle
import secrets
import socket
import struct
import threading
from typing import Any

_NONCE = 32
_HEAD = struct.Struct("!QQ")
_LENGTH = struct.Struct("!Q")
_HELLO = struct.Struct("!I32s")
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


class ChannelClosed(ConnectionError):
    """The other side closed the connection, or its process ended."""


class Channel:
    """Any thread may send; one receives. ``limit_s`` bounds how long the other side may keep one message in the making."""

    def __init__(self, connection: socket.socket, limit_s: float | None = None) -> None:
        connection.settimeout(limit_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """For selectors."""
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def send(self, message: object) -> None:
        self.send_packed(pack(message))

    def send_packed(self, parts: list[memoryview]) -> None:
        """What ``pack`` made, which may go to several ranks. ConnectionError or TimeoutError when it is not taken."""
        with self._sending:
            num_sent = self._connection.sendmsg(parts[:64])  # small messages go at once
            for part in parts:
                if num_sent >= part.nbytes:
                    num_sent -= part.nbytes
                else:
                    self._connection.sendall(part[num_sent:])
                    num_sent = 0

    def receive(self) -> Any:
        """The next message. ``ChannelClosed`` at the end of the connection, TimeoutError for one that stops half-way."""
        size, num_buffers = _HEAD.unpack(self._exactly(_HEAD.size))
        rest = self._exactly(num_buffers * _LENGTH.size + size)
        buffers = [self._exactly(length) for (length,) in _LENGTH.iter_unpack(rest[:-size])]
        return pickle.loads(memoryview(rest)[-size:], buffers=buffers)

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            count = self._connection.recv_into(view[filled:])
            if not count:
                raise ChannelClosed("connection closed by peer")
            filled += count
        return data


def pack(message: object) -> list[memoryview]:
    """A message as it goes over the wire: the pickle's length, number of buffers, their lengths, the pickle, the buffers."""
    found: list[pickle.PickleBuffer] = []
    payload = pickle.dumps(message, protocol=5, buffer_callback=found.append)
    raw = [buffer.raw() for buffer in found]
    head = struct.pack(f"!{len(raw) + 2}Q", len(payload), len(raw), *(view.nbytes for view in raw))
    return [memoryview(head + payload), *raw]


def answer_challenge(connection: socket.socket, secret: str, rank: int) -> None:
    """As trainer rank ``rank``: prove to know the secret."""
    nonce = _read(connection, _NONCE)
    connection.sendall(_HELLO.pack(rank, _proof(secret, nonce, rank)))
    if _read(connection, 1) != b"\1":
        raise ConnectionRefusedError("the driver did not take this rank")


def challenge(connection: socket.socket, secret: str) -> int:
    """As the driver: which rank it is. PermissionError for one that does not know the secret."""
    nonce = secrets.token_bytes(_NONCE)
    connection.sendall(nonce)
    rank, proof = _HELLO.unpack(_read(connection, _HELLO.size))
    if not hmac.compare_digest(proof, _proof(secret, nonce, rank)):
        raise PermissionError("wrong secret")
    return int(rank)


def accept(connection: socket.socket) -> None:
    """As the driver, after ``challenge``: the rank is in."""
    connection.sendall(b"\1")


def _proof(secret: str, nonce: bytes, rank: int) -> bytes:
    return hmac.digest(secret.encode(), nonce + rank.to_bytes(4, "big"), "sha256")


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ChannelClosed("connection closed by peer")
        data += more
    return data
