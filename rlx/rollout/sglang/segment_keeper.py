"""The process beside a sender of weights that answers for its shared-memory segments, and removes them when the sender is gone.

Torch opens a segment by its name and by the socket of a manager, whom every process tells what it opens and closes. Torch's own
manager ends where nobody has met it within two seconds, which a busy machine takes at times. This one is met on a socket that
listens before it is started, waits for as long as the sender lives and then until the last reader has left, and knows the names
of the segments beforehand: whatever way the sender ends, nothing stays behind. It knows no torch and is started by its file.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path


class Notice(ctypes.Structure):
    """What torch tells a manager: that a process opens a segment (and waits for OK), or, with ``free``, that it has closed it."""

    _fields_ = (("pid", ctypes.c_int), ("free", ctypes.c_char), ("name", ctypes.c_char * 60))


SIZE = ctypes.sizeof(Notice)


def keep(listener: socket.socket, sender: int, prefix: Path) -> None:
    """Until ``sender``, a pipe, is at its end and nobody is connected any more. The segments are the files ``prefix``-N."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sender, selectors.EVENT_READ)
    halves: dict[socket.socket, bytes] = {}
    is_there = True
    while is_there or halves:
        for key, _ in selector.select():
            if key.fileobj is listener:
                peer, _ = listener.accept()
                halves[peer] = b""
                selector.register(peer, selectors.EVENT_READ)
            elif key.fileobj == sender:
                is_there = False
                selector.unregister(sender)
                _remove(prefix)
            elif isinstance(key.fileobj, socket.socket) and not _hear(key.fileobj, halves):
                selector.unregister(key.fileobj)
                halves.pop(key.fileobj)
                key.fileobj.close()


def _hear(peer: socket.socket, halves: dict[socket.socket, bytes]) -> bool:
    """Answer what a process says; False once it has left."""
    try:
        more = peer.recv(2**16)
        data = halves[peer] + more
        for start in range(0, len(data) - SIZE + 1, SIZE):
            if Notice.from_buffer_copy(data, start).free == b"\0":
                peer.sendall(b"OK")
    except OSError:
        return False
    halves[peer] = data[len(data) // SIZE * SIZE :]
    return bool(more)


def _remove(prefix: Path) -> None:
    for file in prefix.parent.glob(f"{prefix.name}-*"):
        with suppress(OSError):  # the socket cannot be opened
            _pin(file)
        file.unlink(missing_ok=True)


def _pin(segment: Path) -> None:
    """Count many more users, in the segment's first bytes: the last one would remove it, and end itself when it is not there."""
    with segment.open("r+b", buffering=0) as file:
        count = int.from_bytes(file.read(4), sys.byteorder)
        os.pwrite(file.fileno(), (count + 2**20).to_bytes(4, sys.byteorder), 0)


def main(listener: int, sender: int, prefix: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when the others have
    keep(socket.socket(fileno=listener), sender, Path(prefix))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
