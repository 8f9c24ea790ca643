"""Publishing weights: what every trainer rank does, together, to bring all engines to one new version.

Order: pause all engines -> stage after stage, the sender announces and broadcasts its chunks -> every engine reports the
version -> continue -> canary. The canary comes after ``continue`` because SGLang holds scoring requests while paused;
engines that fail it are paused again at once, and ``publish`` raises, so nothing they wrote meanwhile is used.

Every phase ends with the ranks telling each other how it went. A failure on one rank thus raises on all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from rlx.config.schema import SyncConfig
from rlx.rollout.control import EngineControl, EngineControlError
from rlx.rollout.keys import EngineKeys
from rlx.sync.canary import DEFAULT_TOLERANCE, CanaryResult, CanarySpec, canary_sequences, compare, find_culprits, is_due
from rlx.sync.errors import CanaryError, SyncError
from rlx.sync.fanout import call_all
from rlx.sync.group import GRACE_S, Endpoint, Engine, StageGroup, close_group, open_group
from rlx.sync.ledger import Ledger
from rlx.sync.sender import StageSender
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
class PublisherTarget:
    """The engines, their model (Hugging Face name -> shape; tied tensors once) and how to reach them.

    ``backend`` is "gloo" or "nccl", ``device`` the sender's.
    """

    endpoints: tuple[Endpoint, ...]
    expected: Mapping[str, tuple[int, ...]]
    backend: str
    device: torch.device
    keys: EngineKeys = field(default_factory=EngineKeys)


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
        self._group: StageGroup | None = None
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
        if self._group is not None:
            close_group(self._group)
            self._group = None
        for engine in self._engines:
            engine.control.close()

    def _publish(self, version: int, tensors: Iterator[tuple[str, Tensor]]) -> Ledger:
        self._connect(version)
        self._together(version, "pause", self._pause)
        ledger = Ledger(self._target.expected)
        for stage in range(self._place.num_stages):
            self._send_stage(stage, version, tensors, ledger)
        self._together(version, "verify", lambda: self._verify(version, ledger))
        self._together(version, "continue", lambda: self._lead_calls(EngineControl.resume))
        self._num_syncs += 1
        if self._canary is not None and is_due(self._num_syncs, self._config.canary_first, self._config.canary_every):
            self._run_canary(version, self._canary)
        return ledger

    def _connect(self, version: int) -> None:
        """Create the groups, in pipeline order, before the first publication."""
        if self._connected:
            return
        expected = self._target.expected
        self._together(version, "model", lambda: self._lead_calls(lambda control: check_model(control, expected)))
        for stage in range(self._place.num_stages):
            self._together(version, "group", partial(self._open, stage))
        self._connected = True

    def _open(self, stage: int) -> None:
        if self._place.is_sender and self._place.stage == stage:
            target = self._target
            self._group = open_group(stage, self._engines, target.backend, target.device, self._config.timeout_s)

    def _send_stage(self, stage: int, version: int, tensors: Iterator[tuple[str, Tensor]], ledger: Ledger) -> None:
        """One stage's turn; afterwards every rank's ledger holds its tensors."""
        mine = self._place.stage == stage

        def send() -> list[tuple[str, list[int], str]]:
            if not mine:
                return []
            if self._group is None:
                for _ in tensors:
                    pass
                return []
            before = len(ledger.tensors)
            StageSender(self._group, self._config, self._target.device).send(tensors, ledger, version)
            return [(info.name, list(info.shape), info.dtype) for info in ledger.tensors[before:]]

        reports = self._together(version, f"send of stage {stage}", send)
        if not (mine and self._place.is_sender):
            sent = [TensorInfo(name=name, shape=tuple(shape), dtype=dtype) for rows in reports for name, shape, dtype in rows]
            ledger.record(sent)

    def _verify(self, version: int, ledger: Ledger) -> None:
        """The books are complete and every engine reports the version."""
        ledger.check_complete()
        for url, reported in self._lead_calls(EngineControl.weight_version).items():
            if reported != str(version):
                raise SyncError(f"engine side, phase verify: engine {url} reports version {reported!r} instead of {version}")

    def _run_canary(self, version: int, canary: CanarySpec) -> None:
        sequences = canary_sequences(canary.vocab_size, canary.seed)
        failing: list[tuple[str, CanaryResult]] = []

        def score() -> list[int]:
            trainer = canary.score_on_trainer(sequences)
            tolerance = self._config.canary_tolerance
            for url, rows in self._lead_calls(lambda control: [control.score(tokens) for tokens in sequences]).items():
                result = compare(rows, trainer, DEFAULT_TOLERANCE[canary.dtype] if tolerance is None else tolerance)
                if not result.passed:
                    failing.append((url, result))
            if failing:
                self._pause()
            return [index for index, engine in enumerate(self._engines) for url, _ in failing if engine.url == url]

        reports = self._together(version, "canary", score)
        indices = [index for report in reports for index in report]
        if not indices:
            return
        culprits = self._together(version, "search", lambda: self._search(self._engines[indices[0]], canary))
        names = [text for report in culprits for text in report]
        detail = "; ".join(_describe(url, result) for url, result in failing) or self._engines[indices[0]].url
        raise CanaryError(
            f"weight sync {version}, phase canary: {detail}. Tensors that differ: {', '.join(names) or 'none found'}"
        )

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
        self._lead_calls(lambda control: control.pause("abort"))

    def _lead_calls[T](self, call: Callable[[EngineControl], T]) -> dict[str, T]:
        """On the lead: ``call`` for all engines at once, results by url. On other ranks: nothing."""
        if not self._place.is_lead:
            return {}
        calls = {engine.url: partial(call, engine.control) for engine in self._engines}
        return call_all(calls, 2 * self._config.timeout_s + GRACE_S)

    def _together[T](self, version: int, phase: str, work: Callable[[], T]) -> list[T]:
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
            raise SyncError(f"weight sync {version}, phase {phase}: {'; '.join(problems)}", engines) from error
        return [answer[1] for answer in answers]


def _describe(url: str, result: CanaryResult) -> str:
    return (
        f"engine {url} scores unlike the trainer: mean difference {result.mean_difference:.3g}, largest"
        f" {result.max_difference:.3g} at sequence {result.worst_sequence}, position {result.worst_position}"
    )
