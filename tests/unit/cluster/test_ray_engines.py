"""Which actors of engines are made anew, without Ray's own processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed")

from rlx.cluster.ray.watch import RayEngines
from rlx.engines.fleet import (
    Fleet,
    Member,
    read_fleet,
    write_fleet,
)
from rlx.engines.node import part_path

KILLED, FAILED = -9, 1


class Actor:
    def __init__(self, engine: int, node: int, life: int) -> None:
        self.who, self.status, self.answer = (engine, node, life), None, None

    def poll(self) -> int | None:
        return self.status

    def why(self) -> str:
        return "killed"


@pytest.fixture
def engines(tmp_path: Path) -> tuple[RayEngines, list[str]]:
    """One engine of one node and one of three."""
    (tmp_path / "engines").mkdir()
    said: list[str] = []
    make: Callable[..., Actor] = Actor
    return RayEngines(tmp_path, [1, 3], 2, make, said.append), said  # type: ignore[arg-type]


def who(engines: RayEngines) -> list[tuple[int, int, int]]:
    return [actor.who for actor in engines.children()]  # type: ignore[attr-defined]


def test_a_further_node_is_made_anew_and_the_leader_counts(engines: tuple[RayEngines, list[str]], tmp_path: Path) -> None:
    watch, said = engines
    assert who(watch) == [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0)]
    member = Member(index=1, url="http://x", tp=6)
    write_fleet(part_path(tmp_path, 1), Fleet(members=(member,)))
    dead = watch.children()[2]
    dead.status = KILLED  # type: ignore[attr-defined]
    assert watch.forgives(dead)
    watch.tick()
    assert who(watch)[2] == (1, 1, 0) and watch.children()[2] is not dead and watch.forgives(dead)
    assert said == ["engine 1: killed; its node 1 is made anew"]
    assert read_fleet(part_path(tmp_path, 1)).members == (member,), "the leader says itself that it serves no more"


def test_a_leader_is_a_restart_of_its_engine(engines: tuple[RayEngines, list[str]], tmp_path: Path) -> None:
    watch, said = engines
    for life in (1, 2):
        watch.children()[1].status = KILLED  # type: ignore[attr-defined]
        watch.tick()
        assert who(watch) == [(0, 0, 0), (1, 0, life), (1, 1, 0), (1, 2, 0)]
        assert said[-1] == f"engine 1: killed; restart {life} of 2"
    follower = watch.children()[3]
    follower.status = KILLED  # type: ignore[attr-defined]
    watch.tick()
    assert not watch.forgives(follower) and watch.children()[3] is follower, "no restarts are left"


def test_one_whose_own_code_failed_is_not_made_again(engines: tuple[RayEngines, list[str]]) -> None:
    watch, _ = engines
    for actor in watch.children():
        actor.status = FAILED  # type: ignore[attr-defined]
    watch.tick()
    assert not any(watch.forgives(actor) for actor in watch.children())
