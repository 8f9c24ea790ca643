"""From a configuration to the planner's terms."""

from __future__ import annotations

from rlx.config.parts import EngineSettings
from rlx.config.schema import ClusterConfig, ParallelConfig
from rlx.placement.seats import (
    Demand,
    Machines,
    PlacementError,
    Seats,
    plan_seats,
)


def demand_of(engines: EngineSettings, parallel: ParallelConfig) -> Demand:
    """What is to be seated: trainer ranks laid out as ``parallel`` says, and the engines that the run starts itself."""
    return Demand(
        trainer_ranks=engines.num_trainer_ranks,
        tp=parallel.tp,
        num_engines=engines.num_started,
        engine_gpus=engines.rollout.tp,
        shares_gpus=engines.cluster.colocated,
    )


def machines_of(cluster: ClusterConfig, trainer_nodes: int | None = None) -> Machines:
    """The machines that the configuration names (one where it names none), or ``trainer_nodes`` and its rollout nodes."""
    nodes = cluster.nodes or 1
    return Machines(
        nodes=nodes if trainer_nodes is None else trainer_nodes + cluster.rollout_nodes,
        gpus_per_node=cluster.gpus_per_node,
        island=cluster.nvlink_gpus,
        rollout_nodes=cluster.rollout_nodes,
    )


def seats_of(engines: EngineSettings, parallel: ParallelConfig, trainer_nodes: int | None = None) -> Seats:
    """Who sits where on the machines of ``machines_of``; PlacementError when it does not fit."""
    return plan_seats(machines_of(engines.cluster, trainer_nodes), demand_of(engines, parallel))


def trainers_of_engines(
    engines: EngineSettings, parallel: ParallelConfig, device: str, trainer_nodes: int
) -> dict[int, list[int]]:
    """By engine, the trainer rank on the GPU of each of its ranks; on CPUs, where any rank of the machine would do, all take
    turns."""
    count, tp = engines.num_trainer_ranks, engines.rollout.tp
    if device != "cuda" or not engines.cluster.colocated:
        return {index: [(index * tp + rank) % count for rank in range(tp)] for index in range(engines.num_started)}
    if engines.cluster.gpus_per_node is None:  # one machine: engines take its GPUs in order
        return {index: list(range(index * tp, index * tp + tp)) for index in range(engines.num_started)}
    seats = seats_of(engines, parallel, trainer_nodes)
    return {
        index: [node * seats.ranks_per_node + gpu for node in seat.nodes for gpu in seat.gpus]
        for index, seat in enumerate(seats.engines)
    }


def check_spanning(engines: EngineSettings, seats: Seats) -> None:
    """PlacementError for engines on several nodes that cannot be there."""
    spans = [len(seat.nodes) for seat in seats.engines if len(seat.nodes) > 1]
    if not spans:
        return
    what = f"rollout.tp: {engines.rollout.tp} ranks make an engine span {spans[0]} nodes"
    if engines.rollout.engine != "sglang":
        raise PlacementError(f"{what}, which only SGLang's servers do: set rollout.engine=sglang, or make rollout.tp smaller")
    if engines.transport in ("ipc", "shm"):
        raise PlacementError(
            f"{what}, and sync.transport {engines.transport} joins processes of one machine: use stream, broadcast or disk"
        )
