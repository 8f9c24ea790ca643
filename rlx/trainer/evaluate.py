"""Greedy evaluation on held-out prompts, through the same engines and the same verifier as training."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import Config
from rlx.data.prompts import PromptSource
from rlx.obs.log import phase
from rlx.trainer.roles import Roles
from rlx.types import Prompt, SamplingSpec, StepReport


class Evaluation:
    """Adds ``eval/...`` to the reports of the steps where evaluation is due."""

    def __init__(self, config: Config, roles: Roles, sampling: SamplingSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        self._roles = roles
        self._every, self._last_step = config.evaluation.every, config.run.steps
        self._sampling = replace(sampling, num_samples=1, temperature=0.0)
        self._prompts: list[Prompt] = []
        if config.evaluation.data is not None:
            source = PromptSource(replace(config.data, train=config.evaluation.data), tokenizer, config.run.seed)
            self._prompts = list(source.epoch())[: config.evaluation.max_prompts]

    def is_due(self, step: int) -> bool:
        """After the last step, and every N steps if asked for."""
        return bool(self._prompts) and (step == self._last_step or (self._every > 0 and step % self._every == 0))

    def add_to(self, report: StepReport) -> StepReport:
        """The report, with ``eval/reward_mean`` and ``eval/tokens_mean`` when due."""
        if not self.is_due(report.step):
            return report
        with phase("evaluate", report.step):
            groups = list(self._roles.reward.score(self._roles.rollout.generate(self._prompts, self._sampling)))
        rewards = [reward.value for group in groups for reward in group.rewards or () if reward.valid]
        lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
        added = {"eval/reward_mean": fmean(rewards), "eval/tokens_mean": fmean(lengths)}
        return replace(report, metrics={**report.metrics, **added})
