"""Counts the answers that verifiers could not judge, and says so: a failure must not look like a success."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rlx.obs.log import notice
from rlx.types.rollout import Reward, RolloutGroup

_MAX_CAUSE = 300


class InvalidVerdicts:
    """What became of the answers whose verdicts were noted."""

    def __init__(self) -> None:
        self.num_answers = self.num_invalid = 0
        self.first_cause = ""

    def watch(self, scored: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        """The groups as they come, counted."""
        for group in scored:
            self.note(group.rewards or ())
            yield group

    def note(self, rewards: Sequence[Reward]) -> None:
        """Count these."""
        failed = [reward for reward in rewards if not reward.valid]
        if failed and not self.num_invalid:
            self.first_cause = " ".join((failed[0].error or "no cause").split())[:_MAX_CAUSE]
        self.num_answers, self.num_invalid = self.num_answers + len(rewards), self.num_invalid + len(failed)

    def warn(self, where: str, consequence: str) -> None:
        """Say on the screen and in the log how many there were and the first one's cause; nothing if there were none."""
        if self.num_invalid:
            share = f"{self.num_invalid} of {self.num_answers} answers"
            notice(f"warning: {where}: the verifier failed on {share}, which {consequence}; the first: {self.first_cause}")
