"""The list of engines, put together from several nodes' parts, and the requests beside it."""

from __future__ import annotations

from pathlib import Path

from rlx.engines.fleet import (
    Fleet,
    Held,
    Member,
    let_start,
    read_fleet,
    run_keys,
    take_request,
    take_start,
    write_fleet,
)
from rlx.engines.node import Assembly, part_path
from rlx.processes.rundir import ENDPOINTS


def test_parts_of_several_nodes_keep_who_serves_and_who_is_held(tmp_path: Path) -> None:
    keys = run_keys(tmp_path)
    serves = [Member(index=index, url=f"http://e{index}") for index in range(3)]
    assembly = Assembly(tmp_path, (0, 1))
    write_fleet(part_path(tmp_path, 1), Fleet(members=(serves[2],), keys=keys))
    assembly.tick()
    assert not assembly.is_complete
    held = Held(index=0, incarnation=1)
    write_fleet(part_path(tmp_path, 0), Fleet(members=(serves[1],), held=(held,), keys=keys, num_restarts=1))
    assembly.tick()
    found = read_fleet(tmp_path / ENDPOINTS)
    assert found == Fleet(members=(serves[1], serves[2]), held=(held,), keys=keys, num_restarts=1)


def test_a_life_may_start_once_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    let_start(tmp_path, Held(index=3, incarnation=2))
    assert not take_start(tmp_path, 3, 1) and not take_start(tmp_path, 2, 2) and not take_request(tmp_path, 3, 2)
    assert take_start(tmp_path, 3, 2) and not take_start(tmp_path, 3, 2)
