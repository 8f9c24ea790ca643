"""Another verifier for each source of a mixture (and each evaluation set)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlx.rewards.base import Verifier, asks_group, check_prompt, warm_up
from rlx.rewards.request import RewardRequest
from rlx.types.rollout import Prompt, Reward


class UnknownSourceError(ValueError):
    """A prompt came from a source that no verifier was named for."""


def of_source[Kind](table: Mapping[str, Kind], source: str, otherwise: Kind | None) -> Kind:
    """The row of ``source``, else ``otherwise``; UnknownSourceError when there is neither."""
    found = table.get(source, otherwise)
    if found is None:
        raise UnknownSourceError(f"reward.args.sources has no verifier for {source!r}, and reward.args.otherwise is not set")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class BySource:
    """Asks the verifier of the prompt's source, or ``otherwise``."""

    sources: Mapping[str, Verifier]
    otherwise: Verifier | None = None

    def __call__(self, request: RewardRequest) -> Reward:
        return of_source(self.sources, request.prompt.source, self.otherwise)(request)

    def check_prompt(self, prompt: Prompt) -> None:
        check_prompt(of_source(self.sources, prompt.source, self.otherwise), prompt)

    @property
    def asks_group(self) -> bool:
        return any(map(asks_group, self._verifiers()))

    def warm_up(self) -> None:
        for verifier in self._verifiers():
            warm_up(verifier)

    def _verifiers(self) -> list[Verifier]:
        return [*self.sources.values(), *([] if self.otherwise is None else [self.otherwise])]
