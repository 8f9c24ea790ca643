"""Two network namespaces joined by a veth pair: two hosts with names, addresses and a cable that can be cut."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence


def why_not() -> str | None:
    """Why there cannot be such hosts here; None when there can."""
    if os.getuid():
        return "network namespaces take root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "ip or unshare is not installed (apt-get install iproute2 util-linux)"
    name = f"rlx-probe-{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this kernel or container does not allow network namespaces"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class TwoHosts:
    """``names`` and ``addresses``; ``command`` puts a program on one of them; ``cut`` pulls the cable. ``own_memory``: each
    program has a /dev/shm of its own, by which SGLang tells hosts apart."""

    def __init__(self, *, own_memory: bool = False) -> None:
        self._own_memory = own_memory
        mark = secrets.token_hex(3)
        self.names = (f"host-a-{mark}", f"host-b-{mark}")
        self.addresses = ("10.213.7.1", "10.213.7.2")
        self._ends = (f"va{mark}", f"vb{mark}")
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", self._ends[0], "netns", self.names[0], "type", "veth", "peer", self._ends[1], "netns", self.names[1])
        for name, address, end in zip(self.names, self.addresses, self._ends, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for link in ("lo", end):
                _ip("-n", name, "link", "set", link, "up")

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` on host 0 or 1, under its name."""
        mount = "mount -t tmpfs tmpfs /dev/shm; " if self._own_memory else ""
        inside = ["sh", "-c", f'hostname "$0"; {mount}exec "$@"', self.names[host], *argv]
        return ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "--mount", *inside]

    def cut(self) -> None:
        _ip("-n", self.names[1], "link", "set", self._ends[1], "down")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
