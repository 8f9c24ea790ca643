"""Who sits where: nodes x GPUs in, a seat for every trainer rank and engine out. Pure functions; nothing is started.

Trainer ranks fill the trainer nodes in order, the same number on each, from GPU 0 on. Engines take the GPUs after them,
or nodes of their own (``rollout_nodes``, the last ones). A tensor-parallel group, a trainer's or an engine's, never
straddles two NVLink islands that it could fit into; an engine larger than a node takes whole nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """``nodes`` equal machines. ``gpus_per_node`` None: no GPUs, any number of processes a node. ``island``: GPUs of a
    node that NVLink joins, counted from GPU 0; None: all of them. The last ``rollout_nodes`` nodes hold engines only."""

    nodes: int = 1
    gpus_per_node: int | None = None
    island: int | None = None
    rollout_nodes: int = 0

    @property
    def trainer_nodes(self) -> int:
        return self.nodes - self.rollout_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is to be seated. ``tp`` is the trainers' tensor parallel size, ``engine_gpus`` the GPUs of each engine, which are
    the trainers' own where ``shares_gpus``."""

    trainer_ranks: int
    tp: int = 1
    num_engines: int = 0
    engine_gpus: int = 1
    shares_gpus: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSeat:
    """One engine: its nodes (more than one only for an engine larger than a node) and its GPUs on each of them."""

    nodes: tuple[int, ...]
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePart:
    """What one node holds of an engine: it is the ``rank``-th of the engine's ``num_nodes`` nodes. Rank 0 leads: it answers
    requests and is the one to replace the engine."""

    rank: int = 0
    num_nodes: int = 1
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """The plan. Rank r sits on node ``r // ranks_per_node`` at GPU ``r % ranks_per_node``."""

    machines: Machines
    trainer_ranks: int
    ranks_per_node: int
    engines: tuple[EngineSeat, ...]

    def parts_of(self, node: int) -> dict[int, EnginePart]:
        """Engine number -> what ``node`` starts of it."""
        return {
            index: EnginePart(rank=seat.nodes.index(node), num_nodes=len(seat.nodes), gpus=seat.gpus)
            for index, seat in enumerate(self.engines)
            if node in seat.nodes
        }

    @property
    def leading_nodes(self) -> list[int]:
        """The nodes that lead an engine, in order."""
        return sorted({seat.nodes[0] for seat in self.engines})


class PlacementError(ValueError):
    """The demand does not fit; the message says what would."""


def plan_seats(machines: Machines, demand: Demand) -> Seats:
    """Seat everybody, or raise PlacementError."""
    _check_machines(machines)
    ranks_per_node = _ranks_per_node(machines, demand)
    if machines.gpus_per_node is None:
        first = machines.trainer_nodes if machines.rollout_nodes else 0
        hosts = machines.rollout_nodes or machines.nodes
        engines = tuple(EngineSeat(nodes=(first + index % hosts,), gpus=()) for index in range(demand.num_engines))
    else:
        engines = _engines(machines, demand, ranks_per_node)
    return Seats(machines=machines, trainer_ranks=demand.trainer_ranks, ranks_per_node=ranks_per_node, engines=engines)


def _check_machines(machines: Machines) -> None:
    if machines.trainer_nodes < 1:
        raise PlacementError(
            f"cluster.rollout_nodes: {machines.rollout_nodes} of {machines.nodes} node(s) leaves none to train on;"
            f" use at most {machines.nodes - 1}"
        )
    island, gpus = machines.island, machines.gpus_per_node
    if island is not None and gpus is not None and (island > gpus or gpus % island):
        raise PlacementError(f"cluster.nvlink_gpus: {island} does not divide the {gpus} GPUs of a node")


def _ranks_per_node(machines: Machines, demand: Demand) -> int:
    ranks, nodes, gpus = demand.trainer_ranks, machines.trainer_nodes, machines.gpus_per_node
    if ranks % nodes:
        fitting = [count for count in range(1, nodes + 1) if ranks % count == 0]
        raise PlacementError(
            f"cluster.num_trainer_ranks: {ranks} ranks cannot be split evenly over {nodes} trainer node(s);"
            f" {fitting[-1]} trainer node(s) would do, or {ranks + nodes - ranks % nodes} ranks"
        )
    each = ranks // nodes
    if gpus is None:
        return each
    if each > gpus:
        raise PlacementError(
            f"cluster.num_trainer_ranks: {ranks} ranks on {nodes} trainer node(s) are {each} a node, which has {gpus} GPUs;"
            f" {-(-ranks // gpus)} trainer nodes or {nodes * gpus} ranks would fit"
        )
    island = machines.island or gpus
    if demand.tp > island or (each > demand.tp and island % demand.tp) or each % demand.tp:
        fitting = [size for size in range(1, min(each, island) + 1) if each % size == 0 and island % size == 0]
        raise PlacementError(
            f"parallel.tp: groups of {demand.tp} would straddle NVLink islands of {island} GPUs with {each} trainer rank(s)"
            f" a node; tp {' or '.join(map(str, fitting))} would fit"
        )
    return each


def _engines(machines: Machines, demand: Demand, ranks_per_node: int) -> tuple[EngineSeat, ...]:
    if not demand.num_engines:
        return ()
    free = list(_free_seats(machines, demand.engine_gpus, 0 if demand.shares_gpus else ranks_per_node))
    if demand.shares_gpus:
        free = [seat for seat in free if max(seat[1].gpus) < ranks_per_node]
    if len(free) < demand.num_engines:
        raise PlacementError(_engines_do_not_fit(machines, demand, ranks_per_node, len(free)))
    # One a node in turn: every node's network and memory carries the same share.
    free.sort(key=lambda seat: seat[0])
    return tuple(seat for _, seat in free[: demand.num_engines])


def _free_seats(machines: Machines, size: int, ranks_per_node: int) -> Iterator[tuple[int, EngineSeat]]:
    """(how many engines the node holds before it, seat), node by node."""
    gpus = machines.gpus_per_node
    assert gpus is not None
    own_nodes = machines.rollout_nodes > 0
    nodes = range(machines.trainer_nodes, machines.nodes) if own_nodes else range(machines.nodes)
    taken = 0 if own_nodes else ranks_per_node
    if size > gpus:
        span = size // gpus
        if size % gpus == 0 and not taken:
            for first in range(nodes.start, nodes.stop - span + 1, span):
                yield 0, EngineSeat(nodes=tuple(range(first, first + span)), gpus=tuple(range(gpus)))
        return
    for node in nodes:
        for turn, start in enumerate(_starts(machines.island or gpus, gpus, size, taken)):
            yield turn, EngineSeat(nodes=(node,), gpus=tuple(range(start, start + size)))


def _starts(island: int, gpus: int, size: int, taken: int) -> list[int]:
    """First GPUs of the engines that fit behind ``taken``, none across an island's edge that it could avoid."""
    starts, at = [], taken
    while at + size <= gpus:
        edge = (at // island + 1) * island
        if (size <= island and at + size > edge) or (size > island and at % island):
            at = edge
        else:
            starts.append(at)
            at += size
    return starts


def _engines_do_not_fit(machines: Machines, demand: Demand, ranks_per_node: int, found: int) -> str:
    gpus, size = machines.gpus_per_node, demand.engine_gpus
    assert gpus is not None
    where = (
        f"{machines.rollout_nodes} rollout node(s) of {gpus} GPUs"
        if machines.rollout_nodes
        else f"{machines.nodes} node(s) of {gpus} GPUs with {ranks_per_node} trainer rank(s) each"
    )
    wanted = f"rollout.num_engines x rollout.tp: {demand.num_engines} x {size} GPUs do not fit on {where}"
    if size > gpus and size % gpus:
        return f"{wanted}; an engine larger than a node takes whole nodes: rollout.tp a multiple of {gpus}"
    if size > gpus and not machines.rollout_nodes:
        nodes = demand.num_engines * size // gpus
        return f"{wanted}; an engine larger than a node needs nodes of its own: cluster.rollout_nodes {nodes}"
    a_node = len(_starts(machines.island or gpus, gpus, size, 0)) if size <= gpus else 0
    needed = -(-demand.num_engines // a_node) if a_node else demand.num_engines * (size // gpus)
    fits = f"{found} engine(s) of that size would fit" if found else "none of that size fits"
    return f"{wanted}; {fits}, or all on cluster.rollout_nodes {needed} beside {machines.trainer_nodes} trainer node(s)"


def picture(seats: Seats, *, max_lines: int = 16) -> list[str]:
    """Who sits where, a line a node; runs of nodes that look alike share a line."""
    rows: list[tuple[int, int, str]] = []
    by_node = _engines_by_node(seats)
    for node in range(seats.machines.nodes):
        text = _node_text(seats, node, by_node.get(node, []))
        if rows and rows[-1][2] == text:
            rows[-1] = (rows[-1][0], node, text)
        else:
            rows.append((node, node, text))
    lines = [f"node {first if first == last else f'{first}-{last}'}: {text}" for first, last, text in rows]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"... {len(lines) - max_lines + 1} more lines"]
    return lines


def _engines_by_node(seats: Seats) -> dict[int, list[EngineSeat]]:
    by_node: dict[int, list[EngineSeat]] = {}
    for seat in seats.engines:
        for node in seat.nodes:
            by_node.setdefault(node, []).append(seat)
    return by_node


def _node_text(seats: Seats, node: int, engines: list[EngineSeat]) -> str:
    ranks = seats.ranks_per_node if node < seats.machines.trainer_nodes else 0
    gpus = seats.machines.gpus_per_node
    if gpus is None:
        return f"{ranks} trainer rank(s), {len(engines)} engine(s)"
    cells = ["T"] * ranks + ["."] * (gpus - ranks)
    for letter, seat in zip("ABCDEFGHIJKLMNOPQRSUVWXYZ" * (1 + gpus // 25), engines, strict=False):
        for gpu in seat.gpus:
            cells[gpu] = letter
    spans = "".join(f", part of an engine on {len(seat.nodes)} nodes" for seat in engines if len(seat.nodes) > 1)
    return f"[{' '.join(cells)}] {ranks} trainer rank(s), {len(engines)} engine(s){spans}"
