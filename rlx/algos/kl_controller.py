"""The weight of the KL penalty in the reward: fixed, or steered to a target (Ziegler et al. 2019, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

from rlx.config.algorithm import AlgorithmConfig

# The paper's limit on the proportional error of one update.
MAX_ERROR = 0.2


@dataclass(slots=True, kw_only=True)
class KLController:
    """``coefficient`` is the whole state: save it, and set it again on resume where it is steered. ``target`` None keeps it
    fixed."""

    coefficient: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, num_samples: int) -> None:
        """Take in the mean KL of a sequence over the ``num_samples`` sequences of a batch."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1.0, -MAX_ERROR), MAX_ERROR)
        # A batch larger than the horizon must not turn the weight negative.
        self.coefficient *= 1.0 + error * min(num_samples / self.horizon, 1.0)


def make_kl_controller(config: AlgorithmConfig) -> KLController:
    """The controller that ``config`` asks for; ValueError if an adaptive one has no positive target."""
    if config.kl_controller == "fixed":
        return KLController(coefficient=config.kl_coefficient)
    if config.kl_target <= 0:
        raise ValueError(f"algorithm.kl_target must be above 0 for an adaptive controller, got {config.kl_target}")
    return KLController(coefficient=config.kl_coefficient, target=config.kl_target, horizon=config.kl_horizon)
