"""Evaluation on held-out prompts, through the same engines and the same verifier as training.

Greedy, or with several sampled answers a prompt: then also ``mean@k`` and ``pass@k``, the chance that at least one of k
answers is right (reward of ``evaluation.pass_reward`` or more), by the unbiased estimate of Chen et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import Config
from rlx.data.prompts import PromptSource
from rlx.obs.log import phase
from rlx.trainer.roles import Roles
from rlx.types import Prompt, RolloutGroup, SamplingSpec, StepReport


class Evaluation:
    """Adds ``eval/...`` to the reports of the steps where evaluation is due."""

    def __init__(self, config: Config, roles: Roles, sampling: SamplingSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        self._roles = roles
        self._every, self._last_step = config.evaluation.every, config.run.steps
        settings = config.evaluation
        self._pass_reward = settings.pass_reward
        self._sampling = replace(sampling, num_samples=settings.samples_per_prompt, temperature=settings.temperature)
        self._prompts: list[Prompt] = []
        if config.evaluation.data is not None:
            source = PromptSource(replace(config.data, train=config.evaluation.data), tokenizer, config.run.seed)
            self._prompts = list(source.epoch())[: config.evaluation.max_prompts]

    def is_due(self, step: int) -> bool:
        """After the last step, and every N steps if asked for."""
        return bool(self._prompts) and (step == self._last_step or (self._every > 0 and step % self._every == 0))

    def add_to(self, report: StepReport) -> StepReport:
        """The report, with the metrics of ``summarise`` when due."""
        if not self.is_due(report.step):
            return report
        with phase("evaluate", report.step):
            groups = list(self._roles.reward.score(self._roles.rollout.generate(self._prompts, self._sampling)))
        return replace(report, metrics={**report.metrics, **summarise(groups, self._sampling.num_samples, self._pass_reward)})


def summarise(groups: Sequence[RolloutGroup], num_samples: int, pass_reward: float) -> dict[str, float]:
    """``eval/...`` metrics of scored groups. Answers that could not be judged are counted and have no part in the means."""
    valid = [[reward.value for reward in group.rewards or () if reward.valid] for group in groups]
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    rewards = [value for values in valid for value in values]
    found = {"eval/tokens_mean": fmean(lengths), "eval/invalid": float(len(lengths) - len(rewards))}
    if rewards:
        found["eval/reward_mean"] = fmean(rewards)
        if num_samples > 1:
            found |= at_k(valid, num_samples, pass_reward)
    return found


def at_k(rewards: Sequence[Sequence[float]], num_samples: int, pass_reward: float) -> dict[str, float]:
    """``eval/mean@k`` of all answers, and ``eval/pass@k`` for k = 1, 2, 4, ... up to ``num_samples``.

    A prompt with fewer than k valid answers has no part in pass@k; a k that no prompt reaches is left out.
    """
    found = {f"eval/mean@{num_samples}": fmean(fmean(values) for values in rewards if values)}
    ks = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples] + [num_samples]
    for k in ks:
        chances = [pass_chance(len(values), sum(v >= pass_reward for v in values), k) for values in rewards if len(values) >= k]
        if chances:
            found[f"eval/pass@{k}"] = fmean(chances)
    return found


def pass_chance(num_samples: int, num_right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n answers, drawn without replacement, hold a right one."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
