"""Publishing weights: what every trainer rank does, together, to bring all engines to one new version.

Order: pause all engines, open their update -> stage after stage, the sender sends its chunks -> the books are complete, every
engine has taken the version, ends its update and proves its tensors where it can -> continue -> canary. The canary comes after
``continue`` because SGLang holds scoring requests while paused; engines that fail it are paused again at once, and ``publish``
raises, so nothing they wrote meanwhile is used. Engines on the trainers' GPUs take their weights' memory back before the chunks,
and the rest of it once the trainers have made room.

Every phase ends with the ranks telling each other how it went. A failure on one rank thus raises on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from rlx.arch.engine_format import EngineFormat
from rlx.config.schema import SyncConfig
from rlx.obs.log import logger
from rlx.rollout.keys import EngineKeys
from rlx.rollout.sglang.control import EngineControl
from rlx.sync.collective_phase import Crew, PublisherPlace, Share
from rlx.sync.engine_memory import KEY_VALUES, WEIGHTS, Sharing
from rlx.sync.engine_tensors import EngineTensors
from rlx.sync.errors import SyncError
from rlx.sync.group import Endpoint, Engine, open_group
from rlx.sync.manifest import Ledger
from rlx.sync.model_check import check_model
from rlx.sync.proof.by_checksums import ChecksumProof
from rlx.sync.proof.canary import CanarySpec, canary_sequences, is_due
from rlx.sync.proof.canary_run import CanaryProof
from rlx.sync.sender import StageSender, drain
from rlx.sync.transports.base import Lane
from rlx.sync.transports.broadcast import BroadcastLane
from rlx.sync.transports.disk import DiskLane, SyncFolder
from rlx.sync.transports.handover import Handover, Seats
from rlx.sync.transports.shared_memory import SharedMemoryLane
from rlx.sync.transports.stream import StreamLane
from rlx.types.weights import CanaryReport, TensorInfo, WeightManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherTarget:
    """The engines, their model as trainers have it (Hugging Face name -> shape; tied tensors once) and how to reach them.
    ``fp8`` names the matrices that engines hold in FP8.

    Tensors in ``constant`` never change: engines that hold them are sent the others (but a folder is always whole).
    ``transport`` is "stream", "broadcast", "ipc" (by ``seats``), "shm" or "disk" (through ``folder``), ``backend`` "gloo" or
    "nccl" (of the first two), ``device`` this rank's.
    """

    endpoints: tuple[Endpoint, ...]
    expected: Mapping[str, tuple[int, ...]]
    backend: str
    device: torch.device
    fp8: frozenset[str] = frozenset()
    constant: frozenset[str] = frozenset()
    keys: EngineKeys = field(default_factory=EngineKeys)
    transport: str = "broadcast"
    sharing: Sharing | None = None
    folder: SyncFolder | None = None
    seats: Seats | None = None


class Publisher:
    """One trainer rank's side of all publications of a run. Every method is collective over the trainer ranks.

    ``share`` all-gathers one optional text over the trainer ranks, in rank order. After a failure inside ``publish`` the
    groups may hold half a broadcast: further publications are refused, ``close`` still works.
    """

    def __init__(
        self, place: PublisherPlace, target: PublisherTarget, config: SyncConfig, share: Share, canary: CanarySpec | None
    ) -> None:
        if not target.endpoints:
            raise ValueError("weight sync needs at least one engine (rollout.num_engines or rollout.endpoints)")
        self._target, self._format = target, EngineFormat(shapes=target.expected, converted=target.fp8)
        self._config = config
        # FP8 is proved by checksums: what engines hand out of it are 8 bits without the scales that make them numbers.
        self._canary = replace(canary, export=None) if canary is not None and target.fp8 else canary
        self._engines = tuple(
            Engine(endpoint=end, control=EngineControl(end.url, timeout_s=config.timeout_s, keys=target.keys))
            for end in target.endpoints
        )
        self._place = place
        self._crew = Crew(place, self._engines, share, config.timeout_s)
        self._lane: Lane | None = None
        self._transport = target.transport
        self._handover: Handover | None = None
        if target.transport == "ipc":
            assert target.seats is not None, "the ipc transport needs to know who sits where"
            self._handover = Handover(self._engines, target.seats, place.rank, target.device, config)
        self._proof = None if canary is None else ChecksumProof(self._crew, canary.precision)
        self._connected = False
        self._failure: str | None = None
        self._num_syncs = 0
        self._sent: dict[int, tuple[TensorInfo, ...]] = {}  # by stage, in the last publication
        self._has_constants = False  # whether every engine holds what never changes
        self._last_left_out: frozenset[str] | None = None

    def publish(self, version: int, tensors: Iterator[tuple[str, Tensor]]) -> WeightManifest:
        """Bring every engine to the weights in ``tensors``, labelled ``version``; returns what was delivered, on every rank.
        Of what never changes that is nothing from the second publication on.

        On a sender (transport ipc: on every rank) ``tensors`` yields the stage's full tensors under Hugging Face names (not
        written to again until publish returns); on other ranks it yields anything and is driven to its end, for its gathers are
        collective.
        Raises SyncError (CanaryError when the canary fails) on all ranks; the engines then stay paused.
        """
        if self._failure is not None:
            raise SyncError(f"weight sync {version}: an earlier one failed and the groups may be out of step: {self._failure}")
        began = time.monotonic()
        self._crew.phase_s.clear()
        try:
            ledger, canary = self._publish(version, tensors)
        except SyncError as error:
            self._failure = str(error)
            raise
        delivered, self._has_constants = ledger.tensors, True
        return WeightManifest(
            version=version,
            tensors=delivered,
            num_bytes=sum(info.num_bytes for info in delivered),
            seconds=time.monotonic() - began,
            phase_s=dict(self._crew.phase_s),
            canary=canary,
        )

    def close(self) -> None:
        """Destroy the groups on both sides, within seconds whatever their state. Not collective; may be called twice."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None
        if self._handover is not None:
            self._handover.close()
        for engine in self._engines:
            engine.control.close()

    def room(self, num_bytes: int) -> Tensor | None:
        """Memory to gather a large tensor in that is about to be published; None where there is none."""
        return None if self._handover is None else self._handover.room(num_bytes)

    def release(self, tags: Sequence[str] | None = None) -> None:
        """Pause the engines and let them give back memory (``tags`` of it; None: all they give). SyncError names who failed."""
        sharing = self._target.sharing
        if sharing is not None:
            memory = sharing.memory
            # What comes back of weights is empty. Only the lead knows whether its engines give any, so all say that they may.
            self._has_constants &= tags is not None and WEIGHTS not in tags
            self._crew.together(
                "release", "release memory", lambda: self._crew.lead_asks(lambda engine: memory.release(engine, tags))
            )

    def serve(self) -> None:
        """Let the engines take back what they gave, their weights excepted, and generate."""
        self._lead_together("serve", "continue", self._continue)

    def _publish(self, version: int, tensors: Iterator[tuple[str, Tensor]]) -> tuple[Ledger, CanaryReport | None]:
        what = f"weight sync {version}"
        self._connect(what)
        self._lead_together(what, "pause", lambda engine: engine.control.stop())
        sharing = self._target.sharing
        if sharing is not None:
            memory = sharing.memory
            self._crew.together(
                what, "resume weights", lambda: self._crew.lead_asks(lambda engine: memory.resume(engine, (WEIGHTS,)))
            )
        self._num_syncs += 1
        due = is_due(self._num_syncs, self._config.canary_first, self._config.canary_every)
        canary, proof = (self._canary, self._proof) if due else (None, None)
        if self._format.converted and (self._place.is_sender or self._handover is not None):
            tensors = EngineTensors(tensors, self._format)
        if proof is not None:
            tensors = proof.watch(what, tensors)
        if self._transport != "disk":
            self._lead_together(what, "begin", lambda engine: engine.control.begin_update())
        left_out = self._left_out()
        repeats, self._last_left_out = left_out == self._last_left_out, left_out
        expected = {name: shape for name, shape in self._format.expected.items() if name not in left_out}
        ledger = Ledger(expected, self._format.dtypes)
        tensors = filter(lambda each: each[0] not in left_out, tensors)  # the proof has seen all
        if self._handover is not None:
            self._hand_over(self._handover, version, tensors, ledger, repeats)
        for stage in range(self._place.num_stages) if self._handover is None else ():
            self._send_stage(stage, version, tensors, ledger, repeats)
        self._crew.together(what, "verify", ledger.check_complete)
        if self._transport != "disk":
            self._lead_together(what, "end", lambda engine: engine.control.end_update())
        proved = {} if proof is None else proof.judge(what)
        wanted = self._trainer_scores(what, canary) if canary is not None else []
        if sharing is not None:
            self._crew.together(what, "make room", sharing.make_room)
        self._lead_together(what, "continue", self._continue)
        if canary is None:
            return ledger, None
        return ledger, CanaryProof(self._crew, canary, self._config.canary_tolerance, sharing, proved).run(what, wanted)

    def _left_out(self) -> frozenset[str]:
        """What engines hold already."""
        return self._target.constant if self._has_constants and self._transport != "disk" else frozenset()

    def _lead_together(self, what: str, phase: str, call: Callable[[Engine], None]) -> None:
        self._crew.together(what, phase, lambda: self._crew.lead_asks(call))

    def _continue(self, engine: Engine) -> None:
        if self._target.sharing is not None:
            self._target.sharing.memory.resume(engine, (KEY_VALUES,))
        engine.control.resume()

    def _trainer_scores(self, what: str, canary: CanarySpec) -> list[list[float]]:
        """Of the canary's sequences; before engines on the same device take their memory back."""
        sequences = canary_sequences(canary.vocab_size, canary.seed, canary.images)
        rows, images = [each.token_ids for each in sequences], [each.spans for each in sequences]
        found: list[list[float]] = []
        self._crew.together(what, "canary", lambda: found.extend(canary.score_on_trainer(rows, images)))
        return found

    def _connect(self, what: str) -> None:
        """Create the groups, in pipeline order, before the first publication."""
        if self._connected:
            return
        wanted = self._format
        self._crew.together(what, "model", lambda: self._crew.lead_calls(lambda control: check_model(control, wanted)))
        if self._handover is not None:
            refusals = [text for text in self._crew.together(what, "ipc", self._handover.refusal) if text]
            if refusals:
                logger.warning(
                    "CUDA IPC is refused (%s); weights go through host memory, as with sync.transport=shm", refusals[0]
                )
                self._handover, self._transport = None, "shm"
        for stage in range(self._place.num_stages) if self._handover is None else ():
            self._crew.together(what, "group", partial(self._open, stage))
        self._connected = True

    def _open(self, stage: int) -> None:
        if not self._place.is_sender or self._place.stage != stage:
            return
        target = self._target
        if self._transport == "shm":
            self._lane = SharedMemoryLane(self._engines)
        elif self._transport == "disk":
            assert target.folder is not None, "the disk transport needs a folder"
            self._lane = DiskLane(self._engines, target.folder, stage, self._format.expected, self._config.timeout_s)
        else:
            opened = open_group(stage, self._engines, target.backend, target.device, self._config.timeout_s)
            self._lane = (StreamLane if self._transport == "stream" else BroadcastLane)(opened, target.device)

    def _hand_over(
        self, lane: Handover, version: int, tensors: Iterator[tuple[str, Tensor]], ledger: Ledger, repeats: bool
    ) -> None:
        """Every rank its part: to the engine ranks on its own device. Afterwards every rank's ledger holds all tensors."""
        what, place = f"weight sync {version}", self._place
        texts = self._crew.together(what, "area", lambda: lane.begin(ledger.sizes, repeats))
        self._crew.together(what, "ask", lambda: lane.ask(texts, version))
        for stage in range(place.num_stages):
            mine = stage == place.stage

            def send(stage: int = stage, mine: bool = mine) -> None:
                try:
                    infos = lane.send(stage, ledger.checked(tensors) if mine else None, self._crew.share)
                except Exception as error:
                    if mine:
                        drain(tensors)
                    at = "check" if isinstance(error, SyncError) else f"gather, {ledger.where}: {type(error).__name__}"
                    raise SyncError(f"trainer side, stage {stage}, phase {at}: {error}") from error
                ledger.record(() if mine else infos)

            self._crew.together(what, f"send of stage {stage}", send)
        self._crew.together(what, "load", lane.finish)

    def _send_stage(self, stage: int, version: int, tensors: Iterator[tuple[str, Tensor]], ledger: Ledger, repeats: bool) -> None:
        """One stage's turn; afterwards every rank's ledger holds its tensors. ``repeats``: they are the last publication's."""
        mine = self._place.stage == stage

        def send() -> list[tuple[str, list[int], str]] | None:
            """What a sender sent, unless it is what it sent the last time."""
            if not mine:
                return None
            if self._lane is None:
                for _ in tensors:
                    pass
                return None
            before = len(ledger.tensors)
            StageSender(self._lane, stage, self._config).send(tensors, ledger, version, repeats)
            sent, last = ledger.tensors[before:], self._sent.get(stage)
            self._sent[stage] = sent
            return None if sent == last else [(info.name, list(info.shape), info.dtype) for info in sent]

        reports = self._crew.together(f"weight sync {version}", f"send of stage {stage}", send)
        if mine and self._place.is_sender:
            return
        for rows in reports:
            if rows is not None:
                self._sent[stage] = tuple(TensorInfo(name=name, shape=tuple(shape), dtype=dtype) for name, shape, dtype in rows)
        ledger.record(self._sent[stage])
