"""Which engines serve now: one small file that the launcher writes and the trainers read.

It holds the engines' keys, so only this user can read it. Trainers ask for a replacement by leaving a request beside it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlx.rollout.keys import EngineKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One healthy engine. ``incarnation`` counts its restarts: another one has other (its first) weights."""

    index: int
    url: str
    tp: int = 1
    incarnation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The engines that serve and their keys. ``launched``: ours, so a dead one comes back by itself."""

    members: tuple[Member, ...]
    keys: EngineKeys = field(default_factory=EngineKeys)
    launched: bool = True
    num_restarts: int = 0


def write_fleet(path: Path, fleet: Fleet) -> None:
    """Whoever sees the file sees all of it; nobody else's eyes do."""
    content = {
        "engines": [asdict(member) for member in fleet.members],
        "launched": fleet.launched,
        "num_restarts": fleet.num_restarts,
        "api_key": fleet.keys.api_key,
        "admin_key": fleet.keys.admin_key,
    }
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps(content) + "\n")
    os.replace(partial, path)


def read_fleet(path: Path) -> Fleet:
    """What ``write_fleet`` wrote last."""
    content = json.loads(path.read_text())
    return Fleet(
        members=tuple(Member(**member) for member in content["engines"]),
        keys=EngineKeys(api_key=content["api_key"], admin_key=content["admin_key"]),
        launched=content["launched"],
        num_restarts=content["num_restarts"],
    )


def request_replacement(path: Path, member: Member) -> None:
    """Ask the launcher to end this incarnation of the engine and start another."""
    _request(path, member.index, member.incarnation).touch()


def take_request(path: Path, index: int, incarnation: int) -> bool:
    """Whether a replacement of this incarnation was asked for; the request is then gone."""
    try:
        _request(path, index, incarnation).unlink()
    except FileNotFoundError:
        return False
    return True


def _request(path: Path, index: int, incarnation: int) -> Path:
    return path.with_name(f"{path.stem}-replace-{index}-{incarnation}")
