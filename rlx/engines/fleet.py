"""Which engines serve now: one small file that the launcher writes and the trainers read.

It holds the engines' keys, so only this user can read it. Trainers ask for a replacement, or let an engine start that was
held back for them, by leaving a request beside it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlx.rollout.keys import EngineKeys, new_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One healthy engine. ``incarnation`` counts its restarts: another one has other (its first) weights."""

    index: int
    url: str
    tp: int = 1
    incarnation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An engine that ended on the trainers' devices: this next life of it waits until they let it start."""

    index: int
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The engines that serve and their keys. ``launched``: ours, so a dead one comes back: by itself, or once let where it is
    ``held``."""

    members: tuple[Member, ...]
    held: tuple[Held, ...] = ()
    keys: EngineKeys = field(default_factory=EngineKeys)
    launched: bool = True
    num_restarts: int = 0


def write_fleet(path: Path, fleet: Fleet) -> None:
    """For the trainers; ``write_whole`` says how."""
    content = {
        "engines": [asdict(member) for member in fleet.members],
        "held": [asdict(held) for held in fleet.held],
        "launched": fleet.launched,
        "num_restarts": fleet.num_restarts,
        "api_key": fleet.keys.api_key,
        "admin_key": fleet.keys.admin_key,
    }
    write_whole(path, content)


def write_whole(path: Path, content: Mapping[str, object]) -> None:
    """As JSON. Whoever sees the file sees all of it; nobody else's eyes do."""
    path.parent.mkdir(exist_ok=True)
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
        held=tuple(Held(**held) for held in content["held"]),
        keys=EngineKeys(api_key=content["api_key"], admin_key=content["admin_key"]),
        launched=content["launched"],
        num_restarts=content["num_restarts"],
    )


def wait_for_fleet(path: Path, start_timeout_s: float) -> Fleet:
    """What serves once all engines do. TimeoutError a minute after they were to."""
    limit_s = start_timeout_s + 60
    deadline = time.monotonic() + limit_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no engines in {path} after {limit_s:.0f} s")
        time.sleep(0.05)
    return read_fleet(path)


def request_replacement(run_dir: Path, member: Member, why: str) -> None:
    """Ask whoever started this incarnation of the engine to end it and start another; ``why`` is for people."""
    request = _request(run_dir, "replace", member.index, member.incarnation)
    partial = request.with_name(f"{request.name}.partial")
    partial.write_text(why)
    os.replace(partial, request)


def take_request(run_dir: Path, index: int, incarnation: int) -> str | None:
    """Why a replacement of this incarnation was asked for, if it was; the request is then gone."""
    return _take(_request(run_dir, "replace", index, incarnation))


def let_start(run_dir: Path, held: Held) -> None:
    """Tell whoever holds this engine back that its devices have room now, and keep it until the engine serves or has failed."""
    _request(run_dir, "start", held.index, held.incarnation).touch()


def take_start(run_dir: Path, index: int, incarnation: int) -> bool:
    """Whether this incarnation may start; it may once."""
    return _take(_request(run_dir, "start", index, incarnation)) is not None


def run_keys(run_dir: Path) -> EngineKeys:
    """The keys of a run's engines, made by whichever node asks first; in a file that only this user can read."""
    path = run_dir / "engines" / "keys.json"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        keys, own = new_keys(), path.with_name(f"keys-{secrets.token_hex(8)}")
        handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump([keys.api_key, keys.admin_key], file)
        with suppress(FileExistsError):
            os.link(own, path)  # all or nothing, on network file systems too
        own.unlink()
    api_key, admin_key = json.loads(path.read_text())
    return EngineKeys(api_key=api_key, admin_key=admin_key)


def _request(run_dir: Path, what: str, index: int, incarnation: int) -> Path:
    return run_dir / "engines" / f"{what}-{index}-{incarnation}"


def _take(request: Path) -> str | None:
    try:
        said = request.read_text()
        request.unlink()
    except FileNotFoundError:
        return None
    return said
