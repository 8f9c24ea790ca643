"""Which Ray cluster a run joins, and what Ray reads from the environment when it is first imported. Ray is not imported."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from rlx.config.load import ConfigError
from rlx.config.schema import ClusterConfig

_ANSWER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RayAddress:
    """What ``ray.init`` is given, and the cluster in words."""

    address: str
    name: str

    @property
    def is_own(self) -> bool:
        """Whether the cluster is to live for this run only."""
        return self.address == "local"


def find_cluster(cluster: ClusterConfig) -> RayAddress:
    """``cluster.ray_address``, else RAY_ADDRESS, else the one that ``ray start`` made on this host, else one of our own.

    ConfigError when the one that was named does not answer: Ray itself would try for minutes.
    """
    named = cluster.ray_address or os.environ.get("RAY_ADDRESS")
    if named not in (None, "auto", "local"):
        assert named is not None
        if not _answers(named):
            raise ConfigError([f"no Ray cluster answers at {named} (cluster.ray_address, RAY_ADDRESS)"])
        return RayAddress(address=named, name=f"at {named}")
    found = None if named == "local" else _running_here()
    if found is not None or named == "auto":
        return RayAddress(address="auto", name=f"at {found or 'auto'}")
    return RayAddress(address="local", name="of this run's own")


def prepare_environment(where: RayAddress, failure_timeout_s: float) -> None:
    """Must come before Ray is imported."""
    # A job that was submitted brings a runtime environment; ours is to be merged with it.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    # A launcher that has lost the head node is to say so; Ray would end the process after 60 s.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(int(failure_timeout_s) + 60))
    if where.is_own and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _running_here() -> str | None:
    """The cluster that Ray remembers on this host, where it still answers."""
    remembered = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if not remembered.is_file():
        return None
    address = remembered.read_text().strip()
    return address if _answers(address) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_ANSWER_S):
            return True
    except (OSError, ValueError):
        return False
