"""Which hosts of a torchrun job are still there: every node leaves a sign of life in the store that all of them share.

A cut cable breaks no connection: whoever waits for the other side just waits. The thread here may do that; those who ask
it never do.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError

_BEAT_S = 1.0
_LEAST_S = 10.0
_STOP_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A node that is not heard of any more."""

    node: int
    host: str
    seconds: float

    def __str__(self) -> str:
        return f"host {self.host} (node {self.node}) was lost: not heard of for {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWords:
    """Why a node leaves before the run is over: who failed there, and the log that tells more, if there is one."""

    host: str
    role: str
    rank: int
    cause: str
    log: str | None


class Pulse(threading.Thread):
    """Consumes the other ``nodes``' signs and the key ``end``, produces this one's; waits for the store only and stops when
    told or at ``end``. ``store`` must be a connection of its own. Node 0 keeps the store."""

    def __init__(self, store: TCPStore, node: int, nodes: Sequence[int], *, run: str, end: str) -> None:
        super().__init__(name="pulse", daemon=True)
        self._store, self._node, self._run, self._end = store, node, run, end
        self._others = [other for other in nodes if other != node]
        self._heard: dict[int, tuple[str, float]] = {}
        self._round = time.monotonic()
        self.is_over = False
        """The run's end was announced, or the store left."""
        self.last_words: LastWords | None = None
        """Of a node that said why it leaves."""
        self._own_words: LastWords | None = None

    def run(self) -> None:
        signs: dict[int, str] = {}
        number = 0
        try:
            while not self.is_over:
                number += 1
                self._store.set(self._key(self._node), f"{number} {socket.gethostname()}")
                for other in self._others:
                    if not self._store.check([self._key(other)]):
                        continue
                    sign = self._store.get(self._key(other)).decode()
                    if sign.startswith("{"):
                        self.last_words = LastWords(**json.loads(sign))
                        self._heard.pop(other, None)
                    elif signs.get(other) != sign:
                        signs[other] = sign
                        self._heard[other] = (sign.partition(" ")[2], time.monotonic())
                over = self._store.check([self._end])
                self._round = time.monotonic()
                self.is_over = self.is_over or over
                time.sleep(_BEAT_S)
            if self._own_words is not None:
                self._store.set(self._key(self._node), json.dumps(asdict(self._own_words)))
        except (DistError, RuntimeError):
            self.is_over = True

    def stop(self, last_words: LastWords | None = None) -> None:
        """Tell the other nodes why this one leaves, if it fails, and end the thread, unless a cut cable holds it: an
        interpreter that ends while it is inside torch is aborted."""
        self._own_words = last_words
        self.is_over = True
        if self.is_alive():
            self.join(_STOP_S)

    def lost(self, limit_s: float) -> Lost | None:
        """The node that has been silent for longer, one at most; the store's own when nothing comes through."""
        if self.is_over:
            return None
        now, limit_s = time.monotonic(), max(limit_s, _LEAST_S)
        silent = [
            Lost(node=node, host=host, seconds=now - heard)
            for node, (host, heard) in sorted(self._heard.items())
            if now - heard > limit_s
        ]
        cut_off = now - self._round > limit_s
        return next((found for found in silent if not cut_off or found.node == 0), None)

    def _key(self, node: int) -> str:
        return f"rlx/pulse/{self._run}/{node}"
