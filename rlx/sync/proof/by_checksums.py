"""The proof of a publication by the engines' own checksums, where they give any (``rlx.sync.proof.checksums``).

Senders calculate, while they send, what each parameter should come to. What is equal is proved. What is not differs for sure only
where the calculation is known to fit: half of its kind, the same parameter of all layers, is equal now, or all were before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from rlx.rollout.sglang.control import EngineControl
from rlx.sync.collective_phase import Crew
from rlx.sync.errors import CanaryError
from rlx.sync.proof.checksums import Checksums, kind, watched
from rlx.sync.proof.tensor_compare import Findings
from rlx.types.precision import Precision
from rlx.types.weights import torch_dtype

_NAMED = 10


class ChecksumProof:
    """One a publisher. Every method is collective over the trainer ranks."""

    def __init__(self, crew: Crew, precision: Precision) -> None:
        self._crew, self._dtype = crew, torch_dtype(precision.torch_name)
        self._names: dict[int, frozenset[str]] | None = None  # by the tp of engines that give checksums, once they were asked
        self._books: dict[int, Checksums] = {}
        self._fitting: set[str] = set()  # kinds of which all were equal

    def watch(self, what: str, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """``tensors``, of which a sender takes note as they pass. The engines must have their weights' memory."""
        if self._names is None:
            parts = self._crew.together(what, "checksums", self._ask)
            self._names = {tp: frozenset(names) for part in parts for tp, names in part}
        if not self._crew.place.is_sender:
            return tensors
        self._books = {tp: Checksums(names, tp, self._dtype) for tp, names in self._names.items()}
        return watched(tensors, list(self._books.values()))

    def _ask(self) -> list[tuple[int, list[str]]]:
        """On the lead: how engines that give checksums call their parameters."""
        given = self._crew.lead_calls(EngineControl.checksums)
        return [(engine.endpoint.tp, sorted(ranks[0])) for engine in self._crew.engines if (ranks := given.get(engine.url))]

    def judge(self, what: str) -> Mapping[str, Findings]:
        """What is proved of each engine, by url. CanaryError, on every rank, when a tensor differs."""
        if not self._names:
            return {}
        books, self._books = self._books, {}
        parts = self._crew.together(what, "checksums", lambda: {str(tp): book.found() for tp, book in books.items()})
        wanted = {tp: {name: sums for part in parts for name, sums in part.get(str(tp), {}).items()} for tp in self._names}
        answers = self._crew.together(what, "checksums", lambda: self._compare(wanted))
        found = {url: Findings(**values) for answer in answers for url, values in answer.items()}  # they travelled as JSON
        faults = [
            f"engine {url} holds other weights than it was sent: {', '.join(one.culprits[:_NAMED])}"
            + (f" and {len(one.culprits) - _NAMED} more" if len(one.culprits) > _NAMED else "")
            for url, one in found.items()
            if one.culprits
        ]
        if faults:
            raise CanaryError(f"{what}, phase checksums: {'; '.join(faults)}")
        return found

    def _compare(self, wanted: Mapping[int, Mapping[str, Sequence[str]]]) -> dict[str, dict[str, Any]]:
        """On the lead: each engine's checksums against ``wanted``."""
        given = self._crew.lead_calls(EngineControl.checksums)
        equal: dict[str, set[str]] = {}
        for engine in self._crew.engines:
            if ranks := given.get(engine.url):
                sums = wanted[engine.endpoint.tp]
                equal[engine.url] = {name for name, own in sums.items() if own and own == [rank.get(name) for rank in ranks]}
        tp = {engine.url: engine.endpoint.tp for engine in self._crew.engines}
        return {url: asdict(self._findings(wanted[tp[url]], names)) for url, names in equal.items()}

    def _findings(self, wanted: Mapping[str, Sequence[str]], equal: set[str]) -> Findings:
        of_kind, equal_of_kind = Counter(map(kind, wanted)), Counter(map(kind, equal))
        others = [name for name in wanted if name not in equal]
        fitting = {each for each, count in of_kind.items() if 2 * equal_of_kind[each] >= count} | self._fitting
        self._fitting |= {each for each, count in of_kind.items() if equal_of_kind[each] == count}
        culprits = [name for name in others if wanted[name] and kind(name) in fitting]
        unknown = [name for name in others if name not in culprits]
        refusals = [f"the engine holds {len(unknown)} parameters in a way unknown here, {unknown[0]} first"] if unknown else []
        return Findings(culprits=culprits, num_tensors=len(equal), refusals=refusals)
