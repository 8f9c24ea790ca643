"""A trainer rank's side of the engines: publishing to them, and taking turns with those on its own device.

Every method is collective over the trainer ranks. A failure that another attempt (without the engine that died, say) may
mend is an answer, a ``SyncFailure``, and the same on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlx.config.schema import SyncConfig
from rlx.models.hf.companions import Companions
from rlx.obs.log import logger, notice
from rlx.parallel.context import ParallelContext
from rlx.parallel.memory import GIB, TrainerMemory, device_used
from rlx.rollout.keys import EngineKeys
from rlx.sync.collective_phase import PublisherPlace
from rlx.sync.engine_memory import KEY_VALUES, EngineMemory, Sharing
from rlx.sync.errors import CanaryError, SyncError, SyncFailure
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.sync.publisher import Publisher, PublisherTarget
from rlx.sync.transports.disk import SyncFolder
from rlx.sync.transports.handover import Seats, Spread
from rlx.types.weights import CanaryReport, WeightManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How weights reach engines: ``transport`` (never auto), with ``folder`` for the one that needs it. ``shares``: the engines
    are on the trainers' devices. ``constant``: tensors that never change (a frozen tower's). ``fp8``: those in FP8. ``sharers``:
    by engine, the trainer rank on the device (or machine) of each of its ranks. ``weight_bytes``: the width of a weight."""

    sync: SyncConfig
    transport: str
    folder: SyncFolder | None = None
    shares: bool = False
    constant: frozenset[str] = frozenset()
    fp8: frozenset[str] = frozenset()
    sharers: Mapping[int, Sequence[int]] = field(default_factory=dict)
    weight_bytes: int = 4


class EngineLink:
    """``expected`` is the engines' model (Hugging Face name -> shape), ``canary.export`` the weights to publish."""

    def __init__(
        self,
        options: LinkOptions,
        context: ParallelContext,
        expected: Mapping[str, tuple[int, ...]],
        canary: CanarySpec,
        memory: TrainerMemory,
    ) -> None:
        self._options, self._context, self._expected = options, context, expected
        self._canary, self._memory = canary, memory
        self._keys, self._engine_memory = EngineKeys(), EngineMemory()
        self._publisher: Publisher | None = None
        self._endpoints: tuple[Endpoint, ...] = ()
        self._told = False
        self._num_doubts = 0

    @property
    def transport(self) -> str:
        return self._options.transport

    def room(self, num_bytes: int) -> Tensor | None:
        """Memory to gather a large tensor in; None where there is none."""
        return None if self._publisher is None else self._publisher.room(num_bytes)

    def use(self, keys: EngineKeys, memory: EngineMemory) -> None:
        """Open every engine with these keys from now on; ``memory`` records what co-located ones gave back so far."""
        self._keys, self._engine_memory = keys, memory

    def begin_training(self, endpoints: Sequence[Endpoint], tags: Sequence[str] | None) -> SyncFailure | None:
        """Engines (there may be none) pause and give back memory (``tags`` of it; None: all they give); then ours comes back."""
        failure: SyncFailure | None = None
        try:
            if endpoints:
                self._to(endpoints).release(tags)
        except SyncError as error:
            failure = SyncFailure(message=str(error), engines=error.engines)
        self._memory.bring_back()
        return failure

    def make_room(self) -> None:
        """Ours goes away, for engines that are about to start."""
        self._claim_device()
        self._memory.put_away()

    def end_training(self, endpoints: Sequence[Endpoint]) -> SyncFailure | None:
        """Ours goes away; then the engines, which kept their weights, take theirs back and go on."""
        self._memory.put_away()
        try:
            if endpoints:
                self._to(endpoints).serve()
        except SyncError as error:
            return SyncFailure(message=str(error), engines=error.engines)
        return None

    def publish(self, version: int, endpoints: Sequence[Endpoint]) -> WeightManifest | SyncFailure:
        """Bring these engines to the present weights; other engines than last time are connected anew. CanaryError for
        weights that arrived wrong."""
        self._claim_device()
        self._memory.put_away(("optimizer", "gradients"))
        assert self._canary.export is not None
        try:
            # Engines that serve, or that have just started, still have the memory that our weights may need.
            self._to(endpoints).release((KEY_VALUES,))
            self._memory.bring_back(("weights",))
            manifest = self._to(endpoints).publish(version, self._canary.export())
            self._tell_once()
            parts = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in manifest.phase_s.items())
            logger.info("weight sync %d: %.0f ms: %s", version, manifest.seconds * 1e3, parts)
            self._warn(version, manifest.canary)
            return manifest
        except CanaryError:
            raise
        except SyncError as error:
            self.close()
            return SyncFailure(message=str(error), engines=error.engines)

    def _claim_device(self) -> None:
        """The caller may be a thread that has no GPU yet."""
        if self._context.device.type == "cuda":
            torch.cuda.set_device(self._context.device)

    def _warn(self, version: int, canary: CanaryReport | None) -> None:
        """Doubts that the canary left go to the log: the first and then every tenth. ``sync/canary_doubts`` counts all."""
        for doubt in canary.doubts if canary is not None and self._context.rank == 0 else ():
            if self._num_doubts % 10 == 0:
                notice(f"WARNING canary in doubt after weight sync {version}: {doubt}")
            self._num_doubts += 1

    def _tell_once(self) -> None:
        """How full the shared device is, now that the engines generate."""
        device = self._context.device
        if self._options.shares and not self._told and device.type == "cuda":
            self._told = True
            total = torch.cuda.get_device_properties(device).total_memory
            ours = torch.cuda.memory_reserved(device)
            notice(
                f"memory of {device} while engines generate: {device_used(device) / GIB:.2f} of {total / GIB:.2f} GiB in use,"
                f" {ours / GIB:.2f} by the trainer's tensors"
            )

    def close(self) -> None:
        """Leave the engines' groups."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def _to(self, endpoints: Sequence[Endpoint]) -> Publisher:
        if self._publisher is None or self._endpoints != tuple(endpoints):
            self.close()
            self._endpoints = tuple(endpoints)
            self._publisher = make_publisher(self._options.sync, self._context, self._target(), self._canary)
        return self._publisher

    def _target(self) -> PublisherTarget:
        return PublisherTarget(
            endpoints=self._endpoints,
            expected=self._expected,
            constant=self._options.constant,
            fp8=self._options.fp8,
            backend="nccl" if self._context.device.type == "cuda" else "gloo",
            device=self._context.device,
            keys=self._keys,
            transport=self._options.transport,
            folder=self._options.folder,
            seats=Seats(
                by_engine=self._options.sharers,
                spread=spread_over_stages(self._context) if self._context.dims.pp > 1 else None,
                weight_bytes=self._options.weight_bytes,
            ),
            sharing=Sharing(memory=self._engine_memory, make_room=self._memory.put_away) if self._options.shares else None,
        )


def spread_over_stages(context: ParallelContext) -> Spread:
    """Broadcasts along the pipeline, from the rank of this one's peers that is in the given stage."""
    return lambda buffer, stage: dist.broadcast(buffer, group=context.groups.pp, group_src=stage)


def sync_folder(run_dir: str, sync_dir: str | None, companions: Companions) -> SyncFolder:
    """Where a run's versions go. Below a ``sync_dir`` that several runs may share, each has a folder of its own."""
    run = Path(run_dir).resolve()
    path = run / "sync"
    if sync_dir is not None:
        path = Path(sync_dir).resolve() / f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
    return SyncFolder(path=path, companions=companions)


def make_publisher(sync: SyncConfig, context: ParallelContext, target: PublisherTarget, canary: CanarySpec) -> Publisher:
    """This rank's publisher: one sender a pipeline stage, rank 0 leads."""
    place = PublisherPlace(
        stage=context.pp_rank,
        num_stages=context.dims.pp,
        is_sender=context.is_sender,
        is_lead=context.rank == 0,
        rank=context.rank,
    )
    return Publisher(place, target, sync, context.gather_objects, canary)
