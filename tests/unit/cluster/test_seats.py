"""Who sits where: invariants on random demands, refusals whose advice works, large jobs on paper."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rlx.placement.seats import (
    Demand,
    Machines,
    PlacementError,
    Seats,
    picture,
    plan_seats,
)


def occupied(seats: Seats) -> list[tuple[int, int]]:
    """Every (node, GPU) in use, once for each user."""
    each = seats.ranks_per_node
    trainers = [(rank // each, rank % each) for rank in range(seats.trainer_ranks)]
    return trainers + [(node, gpu) for seat in seats.engines for node in seat.nodes for gpu in seat.gpus]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Machines, Demand]:
    """Jobs of which many fit."""
    island, islands, rollout = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2])), draw(st.integers(0, 6))
    nodes, tp = draw(st.integers(1, 20)), draw(st.sampled_from([size for size in (1, 2, 3, 4) if island % size == 0]))
    each = tp * draw(st.integers(1, island * islands // tp))
    gpus = island * islands
    engine = draw(st.sampled_from([*range(1, gpus + 1), 2 * gpus]))
    where = Machines(nodes=nodes + rollout, gpus_per_node=gpus, island=island, rollout_nodes=rollout)
    return where, Demand(trainer_ranks=nodes * each, tp=tp, num_engines=draw(st.integers(0, 6)), engine_gpus=engine)


@given(jobs())
def test_nobody_shares_a_gpu_and_no_small_group_straddles_an_island(job: tuple[Machines, Demand]) -> None:
    where, demand = job
    try:
        seats = plan_seats(where, demand)
    except PlacementError:
        assume(False)
    used = occupied(seats)
    gpus, island = where.gpus_per_node, where.island
    assert gpus is not None and island is not None
    assert len(used) == len(set(used)) == demand.trainer_ranks + demand.num_engines * demand.engine_gpus
    assert all(0 <= node < where.nodes and 0 <= gpu < gpus for node, gpu in used)
    for first in range(0, demand.trainer_ranks, demand.tp):
        group = [divmod(rank, seats.ranks_per_node) for rank in range(first, first + demand.tp)]
        assert len({(node, gpu // island) for node, gpu in group}) == 1
    for seat in seats.engines:
        if demand.engine_gpus <= island:
            assert len({gpu // island for gpu in seat.gpus}) == len(seat.nodes) == 1
        assert not where.rollout_nodes or min(seat.nodes) >= where.trainer_nodes
    parts = [(index, part) for node in range(where.nodes) for index, part in seats.parts_of(node).items()]
    for index, seat in enumerate(seats.engines):
        own = [part for number, part in parts if number == index]
        assert [part.rank for part in own] == list(range(len(seat.nodes))) and {part.num_nodes for part in own} == {len(own)}
        assert seat.nodes[0] in seats.leading_nodes and {part.gpus for part in own} == {seat.gpus}
    assert len(seats.engines) == demand.num_engines


ONE = dict(nodes=1, gpus_per_node=8)
OWN_NODE = dict(rollout_nodes=1, nodes=2)


@pytest.mark.parametrize(
    ("where", "demand", "key", "advice"),
    [
        (ONE, dict(trainer_ranks=16), "cluster.num_trainer_ranks", dict(nodes=2)),
        (ONE | dict(nodes=3), dict(trainer_ranks=16), "cluster.num_trainer_ranks", dict(nodes=2)),
        (ONE, dict(trainer_ranks=4, num_engines=5), "rollout.num_engines", OWN_NODE),
        (ONE, dict(trainer_ranks=8, num_engines=1), "rollout.num_engines", OWN_NODE),
        (ONE, dict(trainer_ranks=8, num_engines=2, engine_gpus=16), "rollout.tp", dict(rollout_nodes=4, nodes=5)),
        (ONE | dict(nodes=2, rollout_nodes=2), dict(trainer_ranks=8), "cluster.rollout_nodes", dict(rollout_nodes=1)),
    ],
)
def test_refusals_name_the_key_and_what_they_advise_fits(
    where: dict[str, int], demand: dict[str, int], key: str, advice: dict[str, int]
) -> None:
    with pytest.raises(PlacementError, match=re.escape(key)) as refused:
        plan_seats(Machines(**where), Demand(**demand))
    number = advice.get("rollout_nodes", advice.get("nodes"))
    assert re.search(rf"\b{number}\b", str(refused.value)), refused.value
    plan_seats(Machines(**(where | advice)), Demand(**demand))


def test_tensor_groups_stay_inside_an_island() -> None:
    with pytest.raises(PlacementError, match=r"groups of 4 would straddle NVLink islands of 2 .*tp 1 or 2 would fit"):
        plan_seats(Machines(gpus_per_node=8, island=2), Demand(trainer_ranks=8, tp=4))


def test_engines_skip_to_the_next_island_and_spread_over_nodes() -> None:
    seats = plan_seats(Machines(nodes=2, gpus_per_node=8, island=4), Demand(trainer_ranks=6, tp=3, num_engines=2, engine_gpus=4))
    assert [(seat.nodes, seat.gpus) for seat in seats.engines] == [((0,), (4, 5, 6, 7)), ((1,), (4, 5, 6, 7))]
    assert picture(seats) == ["node 0-1: [T T T . A A A A] 3 trainer rank(s), 1 engine(s)"]


def test_without_gpus_engines_take_turns() -> None:
    seats = plan_seats(Machines(nodes=2), Demand(trainer_ranks=2, num_engines=3))
    assert [seat.nodes for seat in seats.engines] == [(0,), (1,), (0,)]


@pytest.mark.parametrize("nodes", [1, 2, 16, 128, 512])
def test_one_to_4096_gpus(nodes: int) -> None:
    rollout = nodes // 4
    where = Machines(nodes=nodes, gpus_per_node=8, rollout_nodes=rollout)
    ranks = 8 * (nodes - rollout) if rollout else 4 * nodes
    seats = plan_seats(where, Demand(trainer_ranks=ranks, tp=4, num_engines=max(1, rollout), engine_gpus=4))
    assert len(picture(seats)) <= 16
    assert len(occupied(seats)) == len(set(occupied(seats)))


def test_llama_405b_and_deepseek_v3_on_paper() -> None:
    llama = plan_seats(
        Machines(nodes=128, gpus_per_node=8, rollout_nodes=32),
        Demand(trainer_ranks=768, tp=8, num_engines=32, engine_gpus=8),
    )
    assert len(set(occupied(llama))) == 128 * 8
    assert picture(llama) == [
        "node 0-95: [T T T T T T T T] 8 trainer rank(s), 0 engine(s)",
        "node 96-127: [A A A A A A A A] 0 trainer rank(s), 1 engine(s)",
    ]
    deepseek = plan_seats(
        Machines(nodes=128, gpus_per_node=8, rollout_nodes=64),
        Demand(trainer_ranks=512, tp=8, num_engines=32, engine_gpus=16),
    )
    assert deepseek.engines[1].nodes == (66, 67) and len(set(occupied(deepseek))) == 128 * 8
    assert "part of an engine on 2 nodes" in picture(deepseek)[1]
