"""From prompts to scored groups, and from scored groups to training samples: what the driver does before any tensor.

Dynamic sampling (Yu et al. 2025, DAPO): groups whose valid rewards are all equal teach nothing; they are set aside and
further prompts asked, at most ``dynamic_max_factor`` times the batch in all. A batch that stays short is trained on as it
is; only when no group at all has signal do groups without signal stand in, so that the run goes on (and changes nothing).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlx.algos.base import Algorithm
from rlx.algos.overlong import overlong_penalty
from rlx.config.schema import Config
from rlx.data.samples import to_train_samples
from rlx.driver.roles import Roles
from rlx.rewards.verdicts import InvalidVerdicts
from rlx.types.rollout import RolloutGroup, SamplingSpec, TrainSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """The groups of one step in prompt order, and what became of all verdicts on the way. ``baselines`` are greedy answers'
    rewards by prompt id (None: not valid)."""

    groups: list[RolloutGroup]
    verdicts: InvalidVerdicts = field(default_factory=InvalidVerdicts)
    baselines: Mapping[int, float | None] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What can be trained on, what was dropped and why, and what was done to the rewards."""

    kept: list[TrainSample]
    drops: Mapping[str, int]
    metrics: Mapping[str, float]


def has_signal(group: RolloutGroup) -> bool:
    """Whether two valid rewards of the group differ."""
    return len({reward.value for reward in group.rewards or () if reward.valid}) > 1


def collect(config: Config, roles: Roles, algorithm: Algorithm, sampling: SamplingSpec) -> Rollouts:
    """The next batch of scored groups."""
    wanted = config.data.prompts_per_step
    if config.algorithm.dynamic_sampling:
        return _collect_with_signal(wanted, config.algorithm.dynamic_max_factor, roles, sampling)
    prompts = roles.prompts.next(wanted)
    verdicts = InvalidVerdicts()
    baselines: dict[int, float | None] = {}
    if algorithm.greedy_baseline:
        greedy = replace(sampling, num_samples=1, temperature=0.0)
        for group in verdicts.watch(roles.reward.score(roles.rollout.generate(prompts, greedy))):
            (reward,) = group.rewards or ()
            baselines[group.prompt.prompt_id] = reward.value if reward.valid else None
    groups = _in_order(verdicts.watch(roles.reward.score(roles.rollout.generate(prompts, sampling))))
    return Rollouts(groups=groups, verdicts=verdicts, baselines=baselines)


def _collect_with_signal(wanted: int, max_factor: float, roles: Roles, sampling: SamplingSpec) -> Rollouts:
    limit = int(wanted * max_factor)
    useful: list[RolloutGroup] = []
    useless: list[RolloutGroup] = []
    verdicts = InvalidVerdicts()
    num_asked = num_rounds = 0
    while len(useful) < wanted and num_asked < limit:
        share = max(len(useful), 1) / max(num_asked, 1)
        missing = wanted - len(useful)
        ask = min(limit - num_asked, missing if not num_asked else max(missing, min(wanted, round(missing / share))))
        for group in verdicts.watch(roles.reward.score(roles.rollout.generate(roles.prompts.next(ask), sampling))):
            (useful if has_signal(group) else useless).append(group)
        num_asked, num_rounds = num_asked + ask, num_rounds + 1
    useful = _in_order(useful)
    metrics = {
        "dynamic/prompts_asked": num_asked,
        "dynamic/rounds": num_rounds,
        "dynamic/groups_without_signal": len(useless),
        "dynamic/groups_surplus": max(0, len(useful) - wanted),
        "dynamic/groups_missing": max(0, wanted - len(useful)),
    }
    groups = useful[:wanted] or _in_order(useless)[:wanted]
    return Rollouts(groups=groups, verdicts=verdicts, metrics={name: float(value) for name, value in metrics.items()})


def _in_order(groups: object) -> list[RolloutGroup]:
    # Groups finish in any order; the batch must not depend on it.
    return sorted(groups, key=lambda group: group.prompt.prompt_id)  # type: ignore[call-overload, no-any-return]


def prepare(config: Config, algorithm: Algorithm, rollouts: Rollouts) -> Samples:
    """Shape rewards by length, compare answers within their groups, drop what cannot be trained on.

    Raises RuntimeError when nothing is left.
    """
    groups, penalties = _with_length_penalty(config, rollouts.groups)
    advantages = None
    if algorithm.group_advantages is not None:
        advantages = [
            algorithm.group_advantages(
                [reward.value for reward in group.rewards or ()],
                [reward.valid for reward in group.rewards or ()],
                rollouts.baselines.get(group.prompt.prompt_id),
            )
            for group in groups
        ]
    drops: Counter[str] = Counter()
    if config.algorithm.overlong_filter:
        groups, advantages, drops["overlong_filtered"] = _without_overlong(groups, advantages)
    kept, more = to_train_samples(groups, advantages)
    drops += more
    if not kept:
        raise RuntimeError(f"no sample of the batch can be trained on; drops: {dict(drops)}")
    metrics = {"reward/overlong_penalty": sum(penalties) / max(1, len(penalties))} if penalties else {}
    return Samples(kept=kept, drops=drops, metrics=metrics)


def _with_length_penalty(config: Config, groups: Sequence[RolloutGroup]) -> tuple[list[RolloutGroup], list[float]]:
    algorithm, max_tokens = config.algorithm, config.rollout.max_new_tokens
    if algorithm.overlong_buffer <= 0:
        return list(groups), []
    shaped, penalties = [], []
    for group in groups:
        rewards = []
        for trajectory, reward in zip(group.trajectories, group.rewards or (), strict=True):
            size = trajectory.num_sampled
            penalty = overlong_penalty(size, max_tokens, algorithm.overlong_buffer, algorithm.overlong_penalty)
            rewards.append(replace(reward, value=reward.value + penalty))
            penalties.append(penalty)
        shaped.append(replace(group, rewards=tuple(rewards)))
    return shaped, penalties


def _without_overlong(
    groups: Sequence[RolloutGroup], advantages: list[list[float]] | None
) -> tuple[list[RolloutGroup], list[list[float]] | None, int]:
    """Answers cut off by the length limit leave the loss; their rewards have had their part in the group's baseline."""
    kept = [[i for i, one in enumerate(group.trajectories) if not one.is_cut_off] for group in groups]
    num_dropped = sum(len(group.trajectories) for group in groups) - sum(len(indices) for indices in kept)
    filtered = [
        replace(
            group,
            trajectories=tuple(group.trajectories[i] for i in indices),
            rewards=tuple((group.rewards or ())[i] for i in indices),
        )
        for group, indices in zip(groups, kept, strict=True)
    ]
    if advantages is None:
        return filtered, None, num_dropped
    return filtered, [[row[i] for i in indices] for row, indices in zip(advantages, kept, strict=True)], num_dropped
