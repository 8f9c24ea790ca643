"""How a world of ranks is cut, and how a batch is dealt to it. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelDims:
    """How a world of ranks is cut. Raises ValueError at birth if the numbers do not fit together.

    Example: ``ParallelDims(world_size=8, tp=2, pp=2)`` has ``dp == 2``.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """Everything that is wrong with the layout, in words; empty when it fits."""
        sizes = {"world_size": self.world_size, "tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "ep": self.ep}
        found = [f"parallel.{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]
        if found:
            return found
        block = self.tp * self.pp * self.cp
        if self.world_size % block:
            found.append(
                f"cluster.num_trainer_ranks: {self.world_size} is not a multiple of parallel.tp x parallel.pp x parallel.cp"
                f" = {self.tp} x {self.pp} x {self.cp} = {block}"
            )
        expert_block = self.expert_tp * self.ep * self.pp
        # Of dense models it is the same block without cp, which fits where the one above does.
        if self.world_size % expert_block and (self.etp is not None or self.ep > 1):
            found.append(
                f"cluster.num_trainer_ranks: {self.world_size} is not a multiple of parallel.etp x parallel.ep x parallel.pp"
                f" = {self.expert_tp} x {self.ep} x {self.pp} = {expert_block}"
            )
        if self.vpp > 1 and self.pp == 1:
            found.append(f"parallel.vpp: {self.vpp} needs parallel.pp > 1, got 1")
        if self.sequence_parallel and self.tp == 1:
            found.append("parallel.sequence_parallel: true needs parallel.tp > 1, got 1")
        return found

    @property
    def dp(self) -> int:
        """Data-parallel size (context parallelism not included)."""
        return self.world_size // (self.tp * self.pp * self.cp)

    def dp_rank_of(self, rank: int) -> int:
        """The data-parallel rank of global rank ``rank``: Megatron numbers tp fastest, then cp, dp, pp.

        Example: of 8 ranks with tp 2 and pp 2, ranks 0 1 4 5 have data-parallel rank 0, ranks 2 3 6 7 have 1.
        """
        return rank // (self.tp * self.cp) % self.dp

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size inside the experts: ``etp``, or ``tp`` when it is not given."""
        return self.tp if self.etp is None else self.etp

    @property
    def sequence_multiple(self) -> int:
        """Each packed sequence is padded to a multiple of this (zigzag context parallelism cuts it in 2 x cp chunks)."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """The whole pack is padded to a multiple of this (sequence parallelism splits it over tp as well)."""
        return self.sequence_multiple * (self.tp if self.sequence_parallel else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatchPlan:
    """One optimizer step. ``micro_batches[dp_rank][i]`` are sample indices; every rank has the same number of them.

    A micro-batch may be empty on a rank (fewer samples than ranks): it is run as one masked-out padding sequence,
    so that collectives stay in step. ``num_loss_tokens`` and ``num_sequences`` (those with tokens to learn from) count the
    whole mini-batch over all ranks.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    num_loss_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How one rollout batch is cut: mini-batches (one optimizer step each), data-parallel ranks, micro-batches."""

    mini_batches: tuple[MiniBatchPlan, ...]
