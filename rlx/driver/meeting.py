"""Where the driver and the trainer ranks find each other: the store at MASTER_ADDR and MASTER_PORT that the ranks meet at too."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from rlx.engines.fleet import run_keys
from rlx.processes.environment import Rendezvous
from rlx.trainer.lane import DriverAddress


def announce_driver(meeting: Rendezvous, address: DriverAddress, timeout_s: float) -> None:
    """Say where the driver listens. ConnectionError when the store is not there in time: rank 0 or its launcher opens it."""
    _store(meeting, timeout_s).set(_key(meeting), json.dumps(asdict(address)))


def find_driver(meeting: Rendezvous, timeout_s: float) -> DriverAddress:
    """What was announced. ConnectionError when nothing is in time."""
    store = _store(meeting, timeout_s)
    try:
        store.wait([_key(meeting)], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise ConnectionError(f"the driver did not say where it is within {timeout_s:g} s; its log is driver-0.log") from error
    return DriverAddress(**json.loads(store.get(_key(meeting))))


def _store(meeting: Rendezvous, timeout_s: float) -> TCPStore:
    limit = timedelta(seconds=timeout_s)
    try:
        return TCPStore(meeting.address, meeting.port, is_master=False, wait_for_workers=False, timeout=limit)
    except RuntimeError as error:
        at = f"{meeting.address}:{meeting.port} (MASTER_ADDR, MASTER_PORT)"
        raise ConnectionError(f"nobody answers at {at} within {timeout_s:g} s: {error}") from error


def _key(meeting: Rendezvous) -> str:
    return f"rlx/driver/{meeting.attempt}"


def lane_secret(run_dir: Path) -> str:
    """What ranks prove to know, from a file that only this user can read."""
    return str(run_keys(run_dir).admin_key)
