"""Which of a Ray cluster's nodes a job takes and what it reserves there. Pure functions; Ray is not asked.

A job is one placement group with one bundle a node of its plan, each on a node of its own. A bundle holds one share of
CPUs a process and the GPUs that the plan uses on that node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlx.config.schema import ClusterConfig
from rlx.placement.from_config import machines_of
from rlx.placement.seats import Demand, PlacementError, Seats, plan_seats

Bundle = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A living node and all that it has, whoever uses it now."""

    host: str
    cpus: float
    gpus: float = 0.0

    def holds(self, bundle: Bundle) -> bool:
        return self.cpus >= bundle["CPU"] and self.gpus >= bundle.get("GPU", 0)


class LackError(RuntimeError):
    """The cluster is too small, or too busy; the message says what it lacks and how much there is."""


def plan_job(cluster: ClusterConfig, demand: Demand, nodes: Sequence[RayNode]) -> Seats:
    """Seat the job's ``demand`` on ``cluster.nodes`` nodes, or on the fewest that hold it.

    PlacementError when no cluster of such nodes would do, LackError when this one is too small.
    """
    gpus = _gpus_per_node(cluster, nodes)
    first, last = (cluster.nodes,) * 2 if cluster.nodes else (cluster.rollout_nodes + 1, max(1, len(nodes)))
    refusals: list[PlacementError] = []
    lack: LackError | None = None
    for count in range(first, max(first, last) + 1):
        try:
            seats = plan_seats(replace(machines_of(cluster), nodes=count, gpus_per_node=gpus), demand)
        except PlacementError as error:
            refusals.append(error)
            continue
        needed = bundles_of(cluster, seats)
        if _fits(needed, nodes):
            return seats
        lack = lack or LackError(_lack_text(needed, nodes))
    if lack is None:
        raise refusals[-1]
    raise lack


def bundles_of(cluster: ClusterConfig, seats: Seats) -> list[Bundle]:
    """What the plan reserves on each of its nodes."""
    threads = float(cluster.threads_per_rank or 1)
    return [_bundle(seats, node, threads) for node in range(seats.machines.nodes)]


def busy_text(needed: Sequence[Bundle], total: Bundle, free: Bundle) -> str:
    """Why a cluster that is large enough has no room now. ``total`` and ``free`` are sums over the cluster."""
    sums = {name: sum(bundle.get(name, 0) for bundle in needed) for name in ("GPU", "CPU")}
    short = [name for name, amount in sums.items() if free.get(name, 0) < amount]
    wanted = _bundles_text(needed)
    names = short or [name for name, amount in sums.items() if amount]
    counts = ", ".join(f"{_count(free.get(name, 0))} of {_count(total.get(name, 0))} {name} free" for name in names)
    what = f"has no {' and no '.join(short)} to spare" if short else "has no such node free"
    return f"{what}: the job needs {wanted}, there are {counts}; others use the rest"


def own_cpus(cluster: ClusterConfig, demand: Demand, cores: int) -> int:
    """CPUs to declare for a Ray of our own on this machine: at least what the job needs there."""
    return max(cores, (demand.trainer_ranks + demand.num_engines) * (cluster.threads_per_rank or 1))


def _gpus_per_node(cluster: ClusterConfig, nodes: Sequence[RayNode]) -> int | None:
    if cluster.gpus_per_node is not None or cluster.device == "cpu":
        return cluster.gpus_per_node
    counts = {int(node.gpus): node.host for node in nodes if node.gpus}
    if len(counts) > 1:
        found = ", ".join(f"{count} on {host}" for count, host in sorted(counts.items()))
        raise PlacementError(
            f"cluster.gpus_per_node: the cluster's nodes have unequal GPUs ({found}); set the number to use of each"
        )
    if not counts and cluster.device == "cuda":
        raise LackError(f"has no GPU: cluster.device is cuda; there are {_nodes_text(nodes)}")
    return next(iter(counts), None)


def _bundle(seats: Seats, node: int, threads: float) -> Bundle:
    ranks = seats.ranks_per_node if node < seats.machines.trainer_nodes else 0
    engines = [seat for seat in seats.engines if node in seat.nodes]
    bundle = {"CPU": max(1, ranks + len(engines)) * threads}
    if seats.machines.gpus_per_node is not None:
        gpus = max([ranks, *(gpu + 1 for seat in engines for gpu in seat.gpus)])
        bundle |= {"GPU": float(gpus)} if gpus else {}
    return bundle


def _fits(needed: Sequence[Bundle], nodes: Sequence[RayNode]) -> bool:
    """Whether each bundle finds a node of its own: the most demanding first, each on the smallest node that holds it."""
    left = sorted(nodes, key=lambda node: (node.gpus, node.cpus))
    for bundle in sorted(needed, key=lambda bundle: (bundle.get("GPU", 0), bundle["CPU"]), reverse=True):
        found = next((node for node in left if node.holds(bundle)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _lack_text(needed: Sequence[Bundle], nodes: Sequence[RayNode]) -> str:
    least = {name: min(bundle.get(name, 0) for bundle in needed) for name in ("GPU", "CPU")}
    short = [
        name
        for name, amount in least.items()
        if sum((node.gpus if name == "GPU" else node.cpus) >= amount for node in nodes) < len(needed) and amount
    ]
    if len(nodes) < len(needed):
        what = f"has too few nodes, {len(nodes)} of {len(needed)}"
    else:
        what = f"lacks {' and '.join(short or ['nodes that are large enough'])}"
    return f"{what}: the job needs {_bundles_text(needed)}; there are {_nodes_text(nodes)}"


def _bundles_text(needed: Sequence[Bundle]) -> str:
    kinds: dict[str, int] = {}
    for bundle in needed:
        text = " + ".join(f"{_count(bundle[name])} {name}" for name in ("GPU", "CPU") if name in bundle)
        kinds[text] = kinds.get(text, 0) + 1
    return " and ".join(f"{count} node(s) with {text}" for text, count in kinds.items())


def _nodes_text(nodes: Sequence[RayNode]) -> str:
    shown = [f"{node.host} ({_count(node.gpus)} GPU, {_count(node.cpus)} CPU)" for node in nodes[:8]]
    more = f" and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    return (", ".join(shown) + more) or "no nodes"


def _count(amount: float) -> str:
    return f"{amount:g}"
