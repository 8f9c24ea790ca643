"""The section ``algorithm`` and what each algorithm's own defaults are. ``docs/algorithms.md`` explains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlx.config.options import by_algorithm, option

# What holds where an algorithm says nothing else.
_COMMON: Mapping[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "loss_aggregation": "token-mean",
    "normalize_by_std": False,
    "whiten_advantages": False,
    "kl_estimator": "k3",
    "dynamic_sampling": False,
    "overlong_buffer": 0.0,
}

# Each row holds what the algorithm's paper sets differently.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ppo": {"whiten_advantages": True},
    "grpo": {"normalize_by_std": True, "loss_aggregation": "seq-mean-token-mean"},
    "dr_grpo": {"loss_aggregation": "constant"},
    "dapo": {"normalize_by_std": True, "clip_high": 0.28, "dynamic_sampling": True, "overlong_buffer": 0.2},
    "rloo": {"loss_aggregation": "seq-mean-token-sum", "kl_estimator": "k1"},
    "reinforce_pp": {"whiten_advantages": True, "kl_estimator": "k1"},
    "reinforce_pp_baseline": {"whiten_advantages": True, "kl_estimator": "k2"},
    "remax": {"loss_aggregation": "seq-mean-token-sum"},
    "gspo": {"normalize_by_std": True, "loss_aggregation": "seq-mean-token-mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"normalize_by_std": True, "clip_low": 1.0, "clip_high": 4.0},
    "prime": {},
}
WITH_CRITIC = ("ppo", "prime")
NEEDS_GROUPS = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp_baseline", "gspo", "cispo", "prime")
# Advantages are a function of one group's rewards alone.
GROUP_ADVANTAGES = tuple(name for name in NEEDS_GROUPS if name != "prime")
KL_IN_REWARD = ("ppo", "reinforce_pp", "rloo")
_NAMED = "a name of docs/algorithms.md, or path/to/file.py:function; none: the algorithm's own"
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant")
CORRECTIONS = ("none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """The update rule. Keys that depend on the algorithm take its paper's value unless they are set."""

    name: str = option("ppo", "the algorithm", choices=tuple(PRESETS))
    loss: str | None = option(None, f"another policy loss: {_NAMED}")
    advantages: str | None = option(None, f"another advantage of groups: {_NAMED}")
    epochs: int = option(1, "passes over a rollout batch", minimum=1)
    num_mini_batches: int = option(1, "optimizer steps a pass", minimum=1)
    gamma: float = option(1.0, "discount", minimum=0, maximum=1)
    lam: float = option(1.0, "GAE lambda (Schulman et al. 2016)", minimum=0, maximum=1)
    clip_low: float = by_algorithm("policy ratio is clipped at 1 - clip_low", minimum=0, maximum=1)
    clip_high: float = by_algorithm("policy ratio is clipped at 1 + clip_high", minimum=0)
    dual_clip: float | None = option(None, "loss of a negative advantage is at most this x |advantage|; none: off", minimum=1)
    value_clip: float | None = option(0.2, "value change is clipped to this; none: no clipping", minimum=0)
    loss_aggregation: str = by_algorithm("how token losses become one number", choices=AGGREGATIONS)
    loss_constant: int | None = option(None, "aggregation constant: tokens a sequence; none: rollout.max_new_tokens", minimum=1)
    whiten_advantages: bool = by_algorithm("zero mean, unit variance over the rollout batch's response tokens")
    normalize_by_std: bool = by_algorithm("divide by the group's standard deviation")
    entropy_coefficient: float = option(0.0, "weight of the entropy bonus", minimum=0)
    kl_placement: str = option("none", "where the KL to the reference enters", choices=("none", "reward", "loss"))
    kl_estimator: str = by_algorithm("estimator of that KL (Schulman 2020)", choices=("k1", "k2", "k3"))
    kl_coefficient: float = option(0.0, "its weight (start value when adaptive)", minimum=0)
    kl_controller: str = option("fixed", "adaptive: Ziegler et al. 2019, reward placement only", choices=("fixed", "adaptive"))
    kl_target: float = option(0.1, "adaptive controller: wanted KL a sequence", minimum=0)
    kl_horizon: float = option(10_000.0, "adaptive controller: samples to adapt over", minimum=1)
    dynamic_sampling: bool = by_algorithm("replace groups of equal rewards by further prompts")
    dynamic_max_factor: float = option(
        4.0, "dynamic sampling: prompts asked for, at most this x data.prompts_per_step", minimum=1
    )
    overlong_filter: bool = option(False, "leave answers cut off by the length limit out of the loss")
    max_staleness: int | None = option(
        None, "leave answers out of the loss that weights of more than this many publications ago began; none: keep", minimum=0
    )
    overlong_buffer: float = by_algorithm(
        "share of rollout.max_new_tokens over which a length penalty grows; 0: off", minimum=0, maximum=1
    )
    overlong_penalty: float = option(1.0, "the penalty at the length limit", minimum=0)
    mismatch_correction: str = option("none", "weight by trainer / engine probability", choices=CORRECTIONS)
    mismatch_high: float = option(2.0, "ratios above are truncated (or masked)", minimum=0)
    mismatch_low: float = option(0.0, "masking: ratios below are masked too", minimum=0)
    mismatch_reject_low: float = option(0.0, "drop a sequence's gradient if its geometric mean ratio is below", minimum=0)
    mismatch_reject_high: float | None = option(None, "or above; none: no limit", minimum=1)
    prime_beta: float = option(0.05, "PRIME: scale of the implicit process reward", minimum=0)

    def __post_init__(self) -> None:
        preset = {**_COMMON, **PRESETS.get(self.name, {})}
        for key, value in preset.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)

    @property
    def needs_critic(self) -> bool:
        """Whether a second model is trained beside the policy (PPO's values, PRIME's process rewards)."""
        return self.name in WITH_CRITIC

    @property
    def needs_reference(self) -> bool:
        return self.kl_placement != "none" or self.name == "prime"
