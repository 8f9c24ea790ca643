"""Publishing weights: what every trainer rank does, together, to bring all engines to one new version.

Order: pause all engines -> stage after stage, the sender sends its chunks -> every engine reports the version -> continue
-> canary. The canary comes after ``continue`` because SGLang holds scoring requests while paused; engines that fail it are
paused again at once, and ``publish`` raises, so nothing they wrote meanwhile is used. Engines on the trainers' GPUs take
their weights' memory back before the chunks, and the rest of it once the trainers have made room.

Every phase ends with the ranks telling each other how it went. A failure on one rank thus raises on all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from rlx.config.schema import SyncConfig
from rlx.rollout.control import EngineControl, EngineControlError
from rlx.rollout.keys import EngineKeys
from rlx.sync.broadcast import BroadcastLane
from rlx.sync.canary import DEFAULT_TOLERANCE, CanaryResult, CanarySpec, canary_sequences, compare, find_culprits, is_due
from rlx.sync.errors import CanaryError, SyncError
from rlx.sync.fanout import call_all
from rlx.sync.group import GRACE_S, Endpoint, Engine, open_group
from rlx.sync.lane import Lane
from rlx.sync.ledger import Ledger
from rlx.sync.occupation import KEY_VALUES, WEIGHTS, EngineMemory
from rlx.sync.sender import StageSender
from rlx.sync.shared_memory import SharedMemoryLane
from rlx.sync.suits import check_model
from rlx.types import TensorInfo, WeightManifest

Share = Callable[[str | None], list[str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherPlace:
    """A trainer rank's part: one sender a pipeline stage, one lead (who speaks for all to the engines) in the whole run."""

    stage: int
    num_stages: int
    is_sender: bool
    is_lead: bool
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Engines on the trainers' own devices: what they have given back, and how this rank makes room for them again."""

    memory: EngineMemory
    make_room: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherTarget:
    """The engines, their model (Hugging Face name -> shape; tied tensors once) and how to reach them.

    ``transport`` is "broadcast", "ipc" or "shm", ``backend`` "gloo" or "nccl" (of broadcasts), ``device`` the sender's.
    """

    endpoints: tuple[Endpoint, ...]
    expected: Mapping[str, tuple[int, ...]]
    backend: str
    device: torch.device
    keys: EngineKeys = field(default_factory=EngineKeys)
    transport: str = "broadcast"
    sharing: Sharing | None = None


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
        self._place = place
        self._target = target
        self._config = config
        self._share = share
        self._canary = canary
        self._engines = tuple(
            Engine(endpoint=end, control=EngineControl(end.url, timeout_s=config.timeout_s, keys=target.keys))
            for end in target.endpoints
        )
        self._lane: Lane | None = None
        self._connected = False
        self._failure: str | None = None
        self._num_syncs = 0

    def publish(self, version: int, tensors: Iterator[tuple[str, Tensor]]) -> WeightManifest:
        """Bring every engine to the weights in ``tensors``, labelled ``version``; returns what was delivered, on every rank.

        On a sender ``tensors`` yields the stage's full tensors under Hugging Face names (not written to again until
        publish returns); on other ranks it yields anything and is driven to its end, for its gathers are collective.
        Raises SyncError (CanaryError when the canary fails) on all ranks; the engines then stay paused.
        """
        if self._failure is not None:
            raise SyncError(f"weight sync {version}: an earlier one failed and the groups may be out of step: {self._failure}")
        began = time.monotonic()
        try:
            ledger = self._publish(version, tensors)
        except SyncError as error:
            self._failure = str(error)
            raise
        delivered = ledger.tensors
        return WeightManifest(
            version=version,
            tensors=delivered,
            num_bytes=sum(info.num_bytes for info in delivered),
            seconds=time.monotonic() - began,
        )

    def close(self) -> None:
        """Destroy the groups on both sides, within seconds whatever their state. Not collective; may be called twice."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None
        for engine in self._engines:
            engine.control.close()

    def release(self, tags: Sequence[str] | None = None) -> None:
        """Pause the engines and let them give back memory (``tags`` of it; None: all they give). SyncError names who failed."""
        sharing = self._target.sharing
        if sharing is not None:
            memory = sharing.memory
            self._together("release", "release memory", lambda: self._lead_asks(lambda engine: memory.release(engine, tags)))

    def serve(self) -> None:
        """Let the engines take back what they gave, their weights excepted, and generate."""
        self._together("serve", "continue", lambda: self._lead_asks(self._continue))

    def _publish(self, version: int, tensors: Iterator[tuple[str, Tensor]]) -> Ledger:
        what = f"weight sync {version}"
        self._connect(what)
        self._together(what, "pause", self._pause)
        sharing = self._target.sharing
        if sharing is not None:
            memory = sharing.memory
            self._together(what, "resume weights", lambda: self._lead_asks(lambda engine: memory.resume(engine, (WEIGHTS,))))
        ledger = Ledger(self._target.expected)
        for stage in range(self._place.num_stages):
            self._send_stage(stage, version, tensors, ledger)
        self._together(what, "verify", lambda: self._verify(version, ledger))
        self._num_syncs += 1
        due = is_due(self._num_syncs, self._config.canary_first, self._config.canary_every)
        canary = self._canary if due else None
        wanted = self._trainer_scores(what, canary) if canary is not None else []
        if sharing is not None:
            self._together(what, "make room", sharing.make_room)
        self._together(what, "continue", lambda: self._lead_asks(self._continue))
        if canary is not None:
            self._run_canary(what, canary, wanted)
        return ledger

    def _continue(self, engine: Engine) -> None:
        if self._target.sharing is not None:
            self._target.sharing.memory.resume(engine, (KEY_VALUES,))
        engine.control.resume()

    def _trainer_scores(self, what: str, canary: CanarySpec) -> list[list[float]]:
        """Of the canary's sequences; before engines on the same device take their memory back."""
        sequences = canary_sequences(canary.vocab_size, canary.seed)
        found: list[list[float]] = []
        self._together(what, "canary", lambda: found.extend(canary.score_on_trainer(sequences)))
        return found

    def _connect(self, what: str) -> None:
        """Create the groups, in pipeline order, before the first publication."""
        if self._connected:
            return
        expected = self._target.expected
        self._together(what, "model", lambda: self._lead_calls(lambda control: check_model(control, expected)))
        for stage in range(self._place.num_stages):
            self._together(what, "group", partial(self._open, stage))
        self._connected = True

    def _open(self, stage: int) -> None:
        if not self._place.is_sender or self._place.stage != stage:
            return
        target = self._target
        if target.transport in ("ipc", "shm"):
            device = target.device if target.transport == "ipc" else torch.device("cpu")
            self._lane = SharedMemoryLane(self._engines, device)
        else:
            opened = open_group(stage, self._engines, target.backend, target.device, self._config.timeout_s)
            self._lane = BroadcastLane(opened, target.device)

    def _send_stage(self, stage: int, version: int, tensors: Iterator[tuple[str, Tensor]], ledger: Ledger) -> None:
        """One stage's turn; afterwards every rank's ledger holds its tensors."""
        mine = self._place.stage == stage

        def send() -> list[tuple[str, list[int], str]]:
            if not mine:
                return []
            if self._lane is None:
                for _ in tensors:
                    pass
                return []
            before = len(ledger.tensors)
            StageSender(self._lane, stage, self._config).send(tensors, ledger, version)
            return [(info.name, list(info.shape), info.dtype) for info in ledger.tensors[before:]]

        reports = self._together(f"weight sync {version}", f"send of stage {stage}", send)
        if not (mine and self._place.is_sender):
            sent = [TensorInfo(name=name, shape=tuple(shape), dtype=dtype) for rows in reports for name, shape, dtype in rows]
            ledger.record(sent)

    def _verify(self, version: int, ledger: Ledger) -> None:
        """The books are complete and every engine reports the version."""
        ledger.check_complete()
        for url, reported in self._lead_calls(EngineControl.weight_version).items():
            if reported != str(version):
                raise SyncError(f"engine side, phase verify: engine {url} reports version {reported!r} instead of {version}")

    def _run_canary(self, what: str, canary: CanarySpec, wanted: list[list[float]]) -> None:
        sequences = canary_sequences(canary.vocab_size, canary.seed)
        failing: list[tuple[str, CanaryResult]] = []

        def score() -> list[int]:
            tolerance = self._config.canary_tolerance
            for url, rows in self._lead_calls(lambda control: [control.score(tokens) for tokens in sequences]).items():
                result = compare(rows, wanted, DEFAULT_TOLERANCE[canary.dtype] if tolerance is None else tolerance)
                if not result.passed:
                    failing.append((url, result))
            if failing:
                self._pause()
            return [index for index, engine in enumerate(self._engines) for url, _ in failing if engine.url == url]

        reports = self._together(what, "canary", score)
        indices = [index for report in reports for index in report]
        if not indices:
            return
        culprits = self._together(what, "search", lambda: self._search(self._engines[indices[0]], canary))
        names = [text for report in culprits for text in report]
        detail = "; ".join(_describe(url, result) for url, result in failing) or self._engines[indices[0]].url
        raise CanaryError(f"{what}, phase canary: {detail}. Tensors that differ: {', '.join(names) or 'none found'}")

    def _search(self, engine: Engine, canary: CanarySpec) -> list[str]:
        """This stage's tensors that ``engine`` holds differently, in words."""
        if canary.export is None:
            return []
        if not self._place.is_sender:
            for _ in canary.export():
                pass
            return []
        try:
            found = find_culprits(engine.control, canary.export(), canary.dtype)
        except EngineControlError as error:
            return [f"(the engine does not give its tensors: {error})"]
        return [f"{culprit.name} (by up to {culprit.max_difference:.3g})" for culprit in found]

    def _pause(self) -> None:
        self._lead_calls(_stop)

    def _lead_calls[T](self, call: Callable[[EngineControl], T]) -> dict[str, T]:
        """On the lead: ``call`` for all engines at once, results by url. On other ranks: nothing."""
        return self._lead_asks(lambda engine: call(engine.control))

    def _lead_asks[T](self, call: Callable[[Engine], T]) -> dict[str, T]:
        """The same with the whole engine."""
        if not self._place.is_lead:
            return {}
        calls = {engine.url: partial(call, engine) for engine in self._engines}
        return call_all(calls, 2 * self._config.timeout_s + GRACE_S)

    def _together[T](self, what: str, phase: str, work: Callable[[], T]) -> list[T]:
        """Do this rank's part of a phase and learn all ranks' results (they travel as JSON). A failure raises on all."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # raised again below, once the other ranks know
            error = caught
        problem = None if error is None else f"trainer rank {self._place.rank}: {error}"
        unwell = list(error.engines) if isinstance(error, SyncError) else []
        answers = [json.loads(text) for text in self._share(json.dumps([problem, result, unwell])) if text is not None]
        problems = [answer[0] for answer in answers if answer[0] is not None]
        if problems:
            engines = [url for answer in answers for url in answer[2]]
            raise SyncError(f"{what}, phase {phase}: {'; '.join(problems)}", engines) from error
        return [answer[1] for answer in answers]


def _describe(url: str, result: CanaryResult) -> str:
    return (
        f"engine {url} scores unlike the trainer: mean difference {result.mean_difference:.3g}, largest"
        f" {result.max_difference:.3g} at sequence {result.worst_sequence}, position {result.worst_position}"
    )


def _stop(control: EngineControl) -> None:
    control.pause("abort")
    control.drain()
