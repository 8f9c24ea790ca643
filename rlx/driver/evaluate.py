"""Evaluation on held-out prompts, through the same engines and the same verifier as training: one set or several.

Greedy, or with several sampled answers a prompt: then also ``mean@k`` and ``pass@k``, the chance that at least one of k
answers is right (reward of ``evaluation.pass_reward`` or more), by the unbiased estimate of Chen et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import Config
from rlx.data.prompts import evaluation_prompts
from rlx.driver.roles import Roles
from rlx.obs.log import logger, phase
from rlx.types.rollout import (
    Prompt,
    RolloutGroup,
    SamplingSpec,
    StepReport,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """Prompts and how to ask them. ``prefix`` begins the names of its metrics: ``eval`` or ``eval/NAME``."""

    prefix: str
    prompts: Sequence[Prompt]
    sampling: SamplingSpec


class Evaluation:
    """Adds ``eval/...`` (``eval/NAME/...`` for a named set) to the reports of the steps where evaluation is due."""

    def __init__(self, config: Config, roles: Roles, sampling: SamplingSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        self._roles = roles
        self._every, self._last_step = config.evaluation.every, config.run.steps
        self._pass_reward = config.evaluation.pass_reward
        self._sets: list[EvaluationSet] = []
        for name, one in config.evaluation.by_name.items():
            prompts, drops = evaluation_prompts(name, one, config, tokenizer)
            logger.info("evaluation %s: %d prompts; over the length limit: %s", name or one.path, len(prompts), dict(drops))
            assert one.samples_per_prompt is not None and one.temperature is not None
            how = replace(sampling, num_samples=one.samples_per_prompt, temperature=one.temperature)
            self._sets.append(EvaluationSet(prefix=f"eval/{name}" if name else "eval", prompts=prompts, sampling=how))

    def is_due(self, step: int) -> bool:
        """After the last step, and every N steps if asked for."""
        return bool(self._sets) and (step == self._last_step or (self._every > 0 and step % self._every == 0))

    def add_to(self, report: StepReport) -> StepReport:
        """The report, with the metrics of ``summarise`` when due."""
        if not self.is_due(report.step):
            return report
        metrics = dict(report.metrics)
        for one in self._sets:
            with phase("evaluate" + one.prefix.removeprefix("eval"), report.step):
                groups = list(self._roles.reward.score(self._roles.rollout.generate(one.prompts, one.sampling)))
            metrics |= summarise(groups, one.sampling.num_samples, self._pass_reward, one.prefix)
        return replace(report, metrics=metrics)


def summarise(groups: Sequence[RolloutGroup], num_samples: int, pass_reward: float, prefix: str = "eval") -> dict[str, float]:
    """Metrics of scored groups, named ``prefix``/... Answers that could not be judged are counted and have no part in the
    means."""
    valid = [[reward.value for reward in group.rewards or () if reward.valid] for group in groups]
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    rewards = [value for values in valid for value in values]
    found = {"tokens_mean": fmean(lengths), "invalid": float(len(lengths) - len(rewards)), "prompts": float(len(groups))}
    if rewards:
        found["reward_mean"] = fmean(rewards)
        if num_samples > 1:
            found |= at_k(valid, num_samples, pass_reward)
    return {f"{prefix}/{name}": value for name, value in found.items()}


def at_k(rewards: Sequence[Sequence[float]], num_samples: int, pass_reward: float) -> dict[str, float]:
    """``mean@k`` of all answers, and ``pass@k`` for k = 1, 2, 4, ... up to ``num_samples``.

    A prompt with fewer than k valid answers has no part in pass@k; a k that no prompt reaches is left out.
    """
    found = {f"mean@{num_samples}": fmean(fmean(values) for values in rewards if values)}
    ks = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples] + [num_samples]
    for k in ks:
        chances = [pass_chance(len(values), sum(v >= pass_reward for v in values), k) for values in rewards if len(values) >= k]
        if chances:
            found[f"pass@{k}"] = fmean(chances)
    return found


def pass_chance(num_samples: int, num_right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n answers, drawn without replacement, hold a right one."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
