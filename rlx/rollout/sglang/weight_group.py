"""The process group over which a trainer hands weights to engines, built the way SGLang builds its own.

Both ends call ``join_weight_group``: the trainer as rank 0, the engines as the ranks after it. The recipe (TCP
rendezvous, a ``PrefixStore`` of the group's name, ``_new_process_group_helper``) is the one of SGLang's
``init_custom_process_group``, so that either end may be stock SGLang. The default process group of a process, if it
has one, is neither needed nor touched: ``torch.distributed.new_group`` could not span trainer and engines.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

TRAINER_RANK = 0


class WeightGroupError(RuntimeError):
    """A weight group that could not be joined: who waited where, how long, and what torch said."""


def join_weight_group(
    *, master_address: str, master_port: int, rank: int, world_size: int, group_name: str, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Join the group ``group_name`` as ``rank`` of ``world_size`` and return it; rank 0 listens on ``master_port``.

    Blocks until every rank has come, at most ``timeout_s`` seconds, which is also the limit of every collective in the
    group. Raises ValueError for numbers that cannot be or a name this process already uses, and WeightGroupError,
    naming group, rank and address, when the others do not come.
    """
    _check(rank, world_size, group_name, backend)
    where = f"weight group {group_name!r}, rank {rank} of {world_size}, tcp://{master_address}:{master_port}"
    timeout = timedelta(seconds=timeout_s)
    try:
        store, _, _ = next(rendezvous(f"tcp://{master_address}:{master_port}", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        group, _ = c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            c10d.Backend(backend),
            c10d.PrefixStore(group_name, store),
            group_name=c10d.GroupName(group_name),
            timeout=timeout,
        )
    except (RuntimeError, OSError) as error:
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = f"timed out after {timeout_s:g} s waiting for the other ranks" if late else "could not be joined"
        raise WeightGroupError(f"{where}: {what} ({error})") from error
    assert isinstance(group, dist.ProcessGroup)
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def _check(rank: int, world_size: int, group_name: str, backend: str) -> None:
    if world_size < 2 or not 0 <= rank < world_size:
        raise ValueError(f"weight group {group_name!r}: rank {rank} of {world_size}; wanted 0 <= rank < world_size >= 2")
    if group_name in c10d._world.pg_names.values():
        raise ValueError(f"weight group {group_name!r}: the specified group name has already been created")
    if backend == "nccl" and dist.is_initialized() and c10d._get_default_group().bound_device_id is not None:
        # torch would try to split the new communicator off the default one, which does not contain the engines.
        raise ValueError(
            f"weight group {group_name!r}: the default process group was made with device_id=...; make it without, as an "
            "NCCL group beyond it cannot be split off from it"
        )


def broadcast_from_trainer(tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start the broadcast of ``tensor`` from the trainer (rank 0 of the group) and return its handle; both sides call this.

    The tensor is read (trainer) or filled (engines) in place and must stay alive until ``wait()`` on the handle returns.
    """
    work: dist.Work | None = dist.broadcast(tensor, group=group, group_src=TRAINER_RANK, async_op=True)
    assert work is not None
    return work


def leave_weight_group(group: dist.ProcessGroup) -> None:
    """Tear the group down on this side. Its name can be used again, on another port, once every side has left."""
    dist.destroy_process_group(group)
