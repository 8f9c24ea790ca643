"""What follows a publication: every engine scores the canary's sequences, and who scores unlike the trainer is looked into.

In bf16 two sound programs differ by much on some sequences, so a difference beyond the tolerance is no proof of a fault. The
engine is then stopped, its tensors are compared with the trainer's bit for bit, and it scores once more with empty caches
(``judge`` has the rule). Nothing that it wrote meanwhile is used if it fails: ``run`` raises, and the engines stay paused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rlx.rollout.sglang.control import EngineControl
from rlx.sync.collective_phase import Crew
from rlx.sync.engine_memory import KEY_VALUES, Sharing
from rlx.sync.errors import CanaryError
from rlx.sync.group import Engine
from rlx.sync.proof.canary import CanaryResult, CanarySpec, canary_sequences, compare, judge
from rlx.sync.proof.tensor_compare import Findings, find_culprits, merge
from rlx.types.weights import CanaryReport


class CanaryProof:
    """One canary. ``run`` is collective over the trainer ranks. ``proved``: what checksums say of engines, by url."""

    def __init__(
        self,
        crew: Crew,
        canary: CanarySpec,
        tolerance: float | None,
        sharing: Sharing | None,
        proved: Mapping[str, Findings],
    ) -> None:
        self._crew, self._canary, self._sharing, self._proved = crew, canary, sharing, proved
        self._tolerance = canary.precision.canary_tolerance if tolerance is None else tolerance
        self._limit = max(canary.precision.canary_limit, self._tolerance)
        self._sequences = canary_sequences(canary.vocab_size, canary.seed, canary.images)
        self._num_texts = sum(sequence.images is None for sequence in self._sequences)
        self._results: dict[str, CanaryResult] = {}

    def run(self, what: str, wanted: Sequence[Sequence[float]]) -> CanaryReport:
        """Compare all engines' scores with the trainer's (read on the lead). Raises CanaryError on every rank."""
        wanted = [sequence.text_scores(row) for sequence, row in zip(self._sequences, wanted, strict=True)] if wanted else wanted
        [first] = [part for part in self._crew.together(what, "canary", lambda: self._score_all(wanted)) if part is not None]
        difference, indices = first
        proved = [self._proved.get(engine.url) for engine in self._crew.engines]
        num_proved = min(0 if found is None else found.num_tensors for found in proved)
        if not indices:
            return CanaryReport(difference=difference, num_proved=num_proved)
        suspects = [self._crew.engines[index] for index in indices]
        findings = self._look_into(what, suspects)
        reports = self._crew.together(what, "second canary", lambda: self._judge_all(suspects, findings, wanted))
        [(faults, doubts)] = [part for part in reports if part is not None]
        if faults:
            raise CanaryError(f"{what}, phase canary: {'; '.join(faults)}")
        return CanaryReport(difference=difference, num_proved=num_proved, doubts=tuple(doubts))

    def _score_all(self, wanted: Sequence[Sequence[float]]) -> tuple[float, list[int]] | None:
        """On the lead: the largest mean difference and the engines that do not pass; these and all others are then stopped."""
        if not self._crew.place.is_lead:
            return None
        scores = self._crew.lead_calls(self._score)
        self._results = {url: self._compare(rows, wanted) for url, rows in scores.items()}
        failing = [index for index, engine in enumerate(self._crew.engines) if not self._results[engine.url].passed]
        if failing:
            self._crew.lead_asks(self._stop)
        return max(result.mean_difference for result in self._results.values()), failing

    def _score(self, control: EngineControl) -> list[list[float]]:
        return [sequence.text_scores(control.score(sequence.token_ids, sequence.images)) for sequence in self._sequences]

    def _compare(self, scores: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> CanaryResult:
        return compare(scores, wanted, self._tolerance, self._num_texts)

    def _stop(self, engine: Engine) -> None:
        engine.control.stop()
        if self._sharing is not None:  # the trainers' weights need the room for the search
            self._sharing.memory.release(engine, (KEY_VALUES,))

    def _look_into(self, what: str, suspects: Sequence[Engine]) -> list[Findings]:
        """What is known of the tensors of each suspect, on every rank."""
        found = []
        for engine in suspects:
            parts = self._crew.together(what, "search", lambda engine=engine: asdict(self._search(engine)))  # type: ignore[misc]
            searched, proved = merge([Findings(**part) for part in parts]), self._proved.get(engine.url)
            found.append(proved if searched.refusals and proved is not None and proved.is_proof else searched)
        if self._sharing is not None:
            memory = self._sharing.memory
            self._crew.together(what, "make room", self._sharing.make_room)
            self._crew.together(what, "make room", lambda: self._crew.lead_asks(lambda each: memory.resume(each, (KEY_VALUES,))))
        return found

    def _search(self, engine: Engine) -> Findings:
        """This rank's part: on a sender, its stage's tensors."""
        if self._canary.export is None:
            return Findings(refusals=["the trainer offers nothing to compare with"])
        if not self._crew.place.is_sender:
            for _ in self._canary.export():
                pass
            return Findings()
        return find_culprits(engine.control, self._canary.export(), self._canary.precision)

    def _judge_all(
        self, suspects: Sequence[Engine], findings: Sequence[Findings], wanted: Sequence[Sequence[float]]
    ) -> tuple[list[str], list[str]] | None:
        """On the lead: sentences about engines at fault and about those in doubt. All go on, or all stay paused."""
        if not self._crew.place.is_lead:
            return None
        faults: list[str] = []
        doubts: list[str] = []
        for engine, found in zip(suspects, findings, strict=True):
            first = self._results[engine.url]
            second = None
            if not found.culprits:
                engine.control.resume()
                second = self._compare(self._score(engine.control), wanted)
            fault, reason = judge(first, second, found, self._tolerance, self._limit)
            text = f"engine {engine.url} scores unlike the trainer: {first.words}. {reason}"
            (faults if fault else doubts).append(text)
        if faults:
            self._crew.lead_calls(lambda control: control.pause("abort"))
        else:
            self._crew.lead_calls(EngineControl.resume)
        return faults, doubts
