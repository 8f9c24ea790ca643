"""From a configuration to the planner's terms."""

from __future__ import annotations

from rlx.config.schema import Config
from rlx.placement.seats import (
    Demand,
    Machines,
    PlacementError,
    Seats,
    plan_seats,
)


def demand_of(config: Config) -> Demand:
    """What the configuration asks to be seated; engines only where it starts some itself."""
    rollout = config.rollout
    return Demand(
        trainer_ranks=config.num_trainer_ranks,
        tp=config.parallel.tp,
        num_engines=rollout.num_engines if config.starts_engines else 0,
        engine_gpus=rollout.tp,
        shares_gpus=config.cluster.colocated,
    )


def machines_of(config: Config, trainer_nodes: int | None = None) -> Machines:
    """The machines that the configuration names (one where it names none), or ``trainer_nodes`` and its rollout nodes."""
    cluster = config.cluster
    nodes = cluster.nodes or 1
    return Machines(
        nodes=nodes if trainer_nodes is None else trainer_nodes + cluster.rollout_nodes,
        gpus_per_node=cluster.gpus_per_node,
        island=cluster.nvlink_gpus,
        rollout_nodes=cluster.rollout_nodes,
    )


def seats_of(config: Config, machines: Machines | None = None) -> Seats:
    """Who sits where; PlacementError when it does not fit."""
    return plan_seats(machines or machines_of(config), demand_of(config))


def check_spanning(config: Config, seats: Seats) -> None:
    """PlacementError for engines on several nodes that cannot be there."""
    spans = [len(seat.nodes) for seat in seats.engines if len(seat.nodes) > 1]
    if not spans:
        return
    what = f"rollout.tp: {config.rollout.tp} ranks make an engine span {spans[0]} nodes"
    if config.rollout.engine != "sglang":
        raise PlacementError(f"{what}, which only SGLang's servers do: set rollout.engine=sglang, or make rollout.tp smaller")
    if config.transport in ("ipc", "shm"):
        raise PlacementError(
            f"{what}, and sync.transport {config.transport} joins processes of one machine: use stream, broadcast or disk"
        )
