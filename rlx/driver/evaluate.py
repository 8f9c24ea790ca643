"""Evaluation on held-out prompts, through the same engines and the same verifier as training: one set or several.

Greedy, or with several sampled answers a prompt: then also ``mean@k`` and ``pass@k``, the chance that at least one of k
answers is right (reward of ``evaluation.pass_reward`` or more), by the unbiased estimate of Chen et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from rlx.config.schema import DataConfig, EvaluationConfig
from rlx.data.images.reader import ImageReader
from rlx.data.prompts import evaluation_prompts
from rlx.driver.roles import RewardService, RolloutService
from rlx.obs.log import logger, phase
from rlx.obs.timers import StepTimer
from rlx.rewards.verdicts import InvalidVerdicts
from rlx.types.rollout import Prompt, Reward, RolloutGroup, SamplingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """Prompts and how to ask them. ``prefix`` begins the names of its metrics: ``eval`` or ``eval/NAME``."""

    prefix: str
    prompts: Sequence[Prompt]
    sampling: SamplingSpec


def evaluation_sets(
    evaluation: EvaluationConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingSpec,
    images: ImageReader | None = None,
) -> Iterator[EvaluationSet]:
    """Every set of the configuration, sampled as training is but for what a set says itself."""
    for name, one in evaluation.by_name.items():
        prompts, drops = evaluation_prompts(name, one, data, tokenizer, sampling.seed, images)
        logger.info("evaluation %s: %d prompts; over the length limit: %s", name or one.path, len(prompts), dict(drops))
        assert one.samples_per_prompt is not None and one.temperature is not None
        how = replace(sampling, num_samples=one.samples_per_prompt, temperature=one.temperature)
        yield EvaluationSet(prefix=f"eval/{name}" if name else "eval", prompts=prompts, sampling=how)


class Evaluation:
    """Measures the present weights of the engines on every set: ``eval/...``, ``eval/NAME/...`` for a named one."""

    def __init__(self, sets: Iterable[EvaluationSet], rollout: RolloutService, reward: RewardService, pass_reward: float) -> None:
        self._rollout, self._reward, self._pass_reward = rollout, reward, pass_reward
        self.sets = list(sets)

    def measure(self, step: int) -> dict[str, float]:
        """The metrics of ``summarise`` for each set, and how long it took."""
        metrics: dict[str, float] = {}
        timer = StepTimer()
        self._rollout.begin_step(step)
        for one in self.sets:
            with phase("evaluate" + one.prefix.removeprefix("eval"), step), timer("evaluate"):
                verdicts = InvalidVerdicts()
                groups = list(verdicts.watch(self._reward.score(self._rollout.generate(one.prompts, one.sampling))))
                verdicts.warn(one.prefix.replace("eval", "evaluation", 1), "count as wrong")
            metrics |= summarise(groups, one.sampling.num_samples, self._pass_reward, one.prefix)
        return metrics | {"perf/evaluate_s": timer.metrics()["perf/evaluate_s"]}


def summarise(groups: Sequence[RolloutGroup], num_samples: int, pass_reward: float, prefix: str = "eval") -> dict[str, float]:
    """Metrics of scored groups, named ``prefix``/... Answers that could not be judged are counted, and count as wrong; they have
    no part in the means of the reward's parts."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    verdicts = [group.rewards or () for group in groups]
    rewards = [reward for of_prompt in verdicts for reward in of_prompt]
    valid = [reward for reward in rewards if reward.valid]
    found = {"reward_mean": fmean(map(_value, rewards))}
    if num_samples > 1:
        found |= at_k(verdicts, num_samples, pass_reward)
    parts = {f"reward_{name}": value for name, value in part_means(valid).items()}
    counts = {
        "tokens_mean": fmean(trajectory.num_sampled for trajectory in trajectories),
        "cut_off_share": fmean(trajectory.is_cut_off for trajectory in trajectories),
        "invalid": float(len(rewards) - len(valid)),
        "prompts": float(len(groups)),
    }
    found = {**found, **{name: value for name, value in parts.items() if name not in found}, **counts}
    return {f"{prefix}/{name}": value for name, value in found.items()}


def _value(reward: Reward) -> float:
    return reward.value if reward.valid else 0.0


def part_means(rewards: Sequence[Reward]) -> dict[str, float]:
    """The mean of each part of the reward, by its name, over the rewards that have it."""
    names = sorted({name for reward in rewards for name in reward.parts})
    return {name: fmean(reward.parts[name] for reward in rewards if name in reward.parts) for name in names}


def at_k(verdicts: Sequence[Sequence[Reward]], num_samples: int, pass_reward: float) -> dict[str, float]:
    """``mean@k`` of all answers, and ``pass@k`` for k = 1, 2, 4, ... up to ``num_samples``. An invalid verdict is no pass.

    A prompt with fewer than k answers has no part in pass@k; a k that no prompt reaches is left out.
    """
    found = {f"mean@{num_samples}": fmean(fmean(map(_value, of_prompt)) for of_prompt in verdicts if of_prompt)}
    rights = [(len(of_prompt), sum(r.valid and r.value >= pass_reward for r in of_prompt)) for of_prompt in verdicts]
    ks = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples] + [num_samples]
    for k in ks:
        chances = [pass_chance(num, num_right, k) for num, num_right in rights if num >= k]
        if chances:
            found[f"pass@{k}"] = fmean(chances)
    return found


def pass_chance(num_samples: int, num_right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n answers, drawn without replacement, hold a right one."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
