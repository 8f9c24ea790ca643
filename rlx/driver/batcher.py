"""From scored groups to a training batch: what is left out, in which order, and under which reason it is counted.

Groups pass the group filters (dynamic sampling; Yu et al. 2025, DAPO: groups whose valid rewards are all equal teach nothing).
Those of the batch have their rewards shaped by length and compared, and then their answers pass the answer filters. Each
filter has a reason; what it drops is counted under the first that does. A batch may come out empty: nothing is trained on then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev

from rlx.algos.base import GroupAdvantages
from rlx.algos.overlong import overlong_penalty
from rlx.config.algorithm import AlgorithmConfig
from rlx.data.samples import UNTRAINABLE, AnswerFilter, RolloutBatch, first_reason, to_train_batch
from rlx.driver.evaluate import part_means
from rlx.driver.groups import ScoredGroup
from rlx.rewards.verdicts import InvalidVerdicts
from rlx.types.rollout import RolloutGroup

GroupFilter = tuple[str, Callable[[ScoredGroup], bool]]
"""(reason, whether a group is left out for it)."""

NO_SIGNAL: GroupFilter = ("without_signal", lambda group: not group.has_signal)
CUT_OFF: AnswerFilter = ("overlong_filtered", lambda trajectory, reward: trajectory.is_cut_off)
SURPLUS = "surplus"


def stale(oldest: int) -> AnswerFilter:
    """Leaves out answers with a token of weights before the version ``oldest``."""
    return ("stale", lambda trajectory, reward: trajectory.oldest_version < oldest)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRules:
    """``prompts_per_step`` groups make a batch. ``sources`` are the names whose rewards are also reported one by one."""

    prompts_per_step: int
    max_new_tokens: int
    algorithm: AlgorithmConfig
    group_advantages: GroupAdvantages | None = None
    sources: frozenset[str] = frozenset()

    @property
    def max_prompts(self) -> int:
        """So many prompts are asked for at most; then a batch that is short stays so."""
        algorithm = self.algorithm
        return int(self.prompts_per_step * algorithm.dynamic_max_factor) if algorithm.dynamic_sampling else self.prompts_per_step

    @property
    def group_filters(self) -> tuple[GroupFilter, ...]:
        return (NO_SIGNAL,) if self.algorithm.dynamic_sampling else ()

    def answer_filters(self, version: int) -> tuple[AnswerFilter, ...]:
        """Those of a batch that the weights ``version`` learn from. An answer that is too old or was cut off has had its part in
        its group's baseline when it leaves."""
        algorithm = self.algorithm
        found = () if algorithm.max_staleness is None else (stale(version - algorithm.max_staleness),)
        return (*found, *((CUT_OFF,) if algorithm.overlong_filter else ()), *UNTRAINABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Every group that came in is one of ``groups`` or counted in ``left_out``; every answer of ``groups`` is one of
    ``samples`` or counted in ``drops``. ``groups`` and ``samples`` are in the order of the prompts."""

    groups: tuple[ScoredGroup, ...]
    samples: RolloutBatch
    left_out: Mapping[str, int]
    drops: Mapping[str, int]
    verdicts: InvalidVerdicts
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return not len(self.samples)


class Batcher:
    """Takes groups until a batch is there. ``num_wanted`` says how many prompts to ask for next; the order in which groups come
    has no part in what comes out."""

    def __init__(self, rules: BatchRules) -> None:
        self._rules = rules
        self._seen: list[ScoredGroup] = []
        self._useful: list[ScoredGroup] = []
        self._left_out: Counter[str] = Counter()
        self._num_rounds = 0

    @property
    def num_wanted(self) -> int:
        """What is missing first, then as many prompts as should fill the batch, by the share that was useful so far."""
        wanted, num_seen = self._rules.prompts_per_step, len(self._seen)
        missing = wanted - len(self._useful)
        if not num_seen:
            return missing
        share = max(len(self._useful), 1) / num_seen
        return min(self._rules.max_prompts - num_seen, max(missing, min(wanted, round(missing / share))))

    def add(self, groups: Sequence[ScoredGroup], version: int = 0) -> Batch | None:
        """The batch, once there are groups enough or no more prompts are to be asked; then the next one begins. ``version`` is
        that of the present weights."""
        self._num_rounds += 1
        self._seen += groups
        for group in groups:
            reason = first_reason(self._rules.group_filters, group)
            if reason is None:
                self._useful.append(group)
            else:
                self._left_out[reason] += 1
        if len(self._useful) < self._rules.prompts_per_step and len(self._seen) < self._rules.max_prompts:
            return None
        batch = self._make(version)
        self._seen, self._useful, self._left_out, self._num_rounds = [], [], Counter(), 0
        return batch

    def _make(self, version: int) -> Batch:
        rules = self._rules
        useful = _in_order(self._useful)
        chosen = tuple(useful[: rules.prompts_per_step])
        left_out = self._left_out + Counter({SURPLUS: len(useful) - len(chosen)})
        shaped, penalties = _with_length_penalty(rules, [one.group for one in chosen])
        advantages = _advantages(rules, shaped, [one.baseline for one in chosen])
        samples, drops = to_train_batch(shaped, advantages, rules.answer_filters(version))
        seen, verdicts = _in_order(self._seen), InvalidVerdicts()
        for one in seen:
            verdicts.note(one.verdicts)
        metrics = reward_metrics([one.group for one in (chosen if len(samples) else seen)], rules.sources)
        metrics["reward/invalid"] = float(verdicts.num_invalid)
        if penalties:
            metrics["reward/overlong_penalty"] = sum(penalties) / len(penalties)
        if rules.algorithm.dynamic_sampling:
            metrics |= self._dynamic_metrics(left_out, num_missing=rules.prompts_per_step - len(chosen))
        metrics |= {f"drops/{reason}": float(count) for reason, count in drops.items()}
        return Batch(groups=chosen, samples=samples, left_out=left_out, drops=drops, verdicts=verdicts, metrics=metrics)

    def _dynamic_metrics(self, left_out: Mapping[str, int], num_missing: int) -> dict[str, float]:
        return {
            "dynamic/prompts_asked": float(len(self._seen)),
            "dynamic/rounds": float(self._num_rounds),
            "dynamic/groups_without_signal": float(left_out.get(NO_SIGNAL[0], 0)),
            "dynamic/groups_surplus": float(left_out.get(SURPLUS, 0)),
            "dynamic/groups_missing": float(num_missing),
        }


def _in_order(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    # Groups finish in any order; the batch must not depend on it.
    return sorted(groups, key=lambda one: one.prompt_id)


def _with_length_penalty(rules: BatchRules, groups: Sequence[RolloutGroup]) -> tuple[list[RolloutGroup], list[float]]:
    algorithm = rules.algorithm
    if algorithm.overlong_buffer <= 0:
        return list(groups), []
    shaped, penalties = [], []
    for group in groups:
        rewards = []
        for trajectory, reward in zip(group.trajectories, group.rewards or (), strict=True):
            size = trajectory.num_sampled
            penalty = overlong_penalty(size, rules.max_new_tokens, algorithm.overlong_buffer, algorithm.overlong_penalty)
            rewards.append(replace(reward, value=reward.value + penalty))
            penalties.append(penalty)
        shaped.append(replace(group, rewards=tuple(rewards)))
    return shaped, penalties


def _advantages(rules: BatchRules, groups: Sequence[RolloutGroup], baselines: Sequence[float | None]) -> list[list[float]] | None:
    """Each answer's, compared within its group; None where a critic supplies them."""
    compare = rules.group_advantages
    if compare is None:
        return None
    verdicts = [group.rewards or () for group in groups]
    return [
        compare([reward.value for reward in rewards], [reward.valid for reward in rewards], baseline)
        for rewards, baseline in zip(verdicts, baselines, strict=True)
    ]


def reward_metrics(groups: Sequence[RolloutGroup], sources: frozenset[str]) -> dict[str, float]:
    """Means over the answers of these groups, those of rewards over valid verdicts; no reward where there is none."""
    valid = [reward for group in groups for reward in group.rewards or () if reward.valid]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    metrics = {
        "response/tokens_mean": fmean(trajectory.num_sampled for trajectory in trajectories),
        "response/cut_off_share": fmean(trajectory.is_cut_off for trajectory in trajectories),
    }
    if valid:
        values = [reward.value for reward in valid]
        metrics |= {"reward/mean": fmean(values), "reward/std": pstdev(values)}
    for source in sorted({group.prompt.source for group in groups} & sources):
        of_source = [r.value for group in groups if group.prompt.source == source for r in group.rewards or () if r.valid]
        if of_source:
            metrics[f"reward/mean/{source}"] = fmean(of_source)
    # A part that is called like one of ours does not replace it.
    return {f"reward/{part}": value for part, value in part_means(valid).items()} | metrics
