"""The stream of scored groups: prompts are drawn, answered and judged. What is trained on is the batcher's to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlx.data.prompts import PromptSource
from rlx.driver.roles import RewardService, RolloutService
from rlx.types.rollout import Prompt, Reward, RolloutGroup, SamplingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with a verdict on every answer. ``greedy`` is the verdict on the greedy answer, for algorithms that compare
    with it."""

    group: RolloutGroup
    greedy: Reward | None = None

    @property
    def prompt_id(self) -> int:
        return self.group.prompt.prompt_id

    @property
    def rewards(self) -> tuple[Reward, ...]:
        return self.group.rewards or ()

    @property
    def verdicts(self) -> tuple[Reward, ...]:
        """All verdicts that were asked for."""
        return self.rewards if self.greedy is None else (self.greedy, *self.rewards)

    @property
    def baseline(self) -> float | None:
        """The greedy answer's reward; None without one, or where it could not be judged."""
        return self.greedy.value if self.greedy is not None and self.greedy.valid else None

    @property
    def has_signal(self) -> bool:
        """Whether two valid rewards differ."""
        return len({reward.value for reward in self.rewards if reward.valid}) > 1


class GroupStream:
    """Draws prompts from where it stands, has them answered and judged. ``greedy_baseline``: each is answered greedily too.

    It knows of no batch and of no step but the one that it is told, so any one thread may call ``next``.
    """

    def __init__(
        self,
        prompts: PromptSource,
        rollout: RolloutService,
        reward: RewardService,
        sampling: SamplingSpec,
        *,
        greedy_baseline: bool = False,
    ) -> None:
        self._prompts, self._rollout, self._reward = prompts, rollout, reward
        self._sampling, self._greedy_baseline = sampling, greedy_baseline
        self._step: int | None = None

    def next(self, num_prompts: int, step: int) -> list[ScoredGroup]:
        """The groups of the next ``num_prompts`` prompts in the order they finished, recorded (or replayed) as of ``step``."""
        if step != self._step:
            self._rollout.begin_step(step)
            self._step = step
        prompts = self._prompts.next(num_prompts)
        greedy: dict[int, Reward] = {}
        if self._greedy_baseline:
            for group in self._judged(prompts, replace(self._sampling, num_samples=1, temperature=0.0)):
                (greedy[group.prompt.prompt_id],) = group.rewards or ()
        groups = self._judged(prompts, self._sampling)
        return [ScoredGroup(group=group, greedy=greedy.get(group.prompt.prompt_id)) for group in groups]

    def metrics(self) -> dict[str, float]:
        """How far the prompts have been dealt: ``data/...``."""
        return self._prompts.metrics()

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to go on exactly here (JSON-able)."""
        return self._prompts.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; ValueError when the prompts are others now."""
        self._prompts.load_state(state)

    def _judged(self, prompts: Sequence[Prompt], sampling: SamplingSpec) -> list[RolloutGroup]:
        return list(self._reward.score(self._rollout.generate(prompts, sampling)))
