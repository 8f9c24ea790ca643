"""The training loop: generate, score, learn, publish. One iteration reads top to bottom in ``PPOTrainer.step``.

The driver sees only the Protocols of ``rlx.driver.roles``; it holds samples and plans, never token columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from rlx.algos.base import Algorithm
from rlx.algos.kl_controller import KLController
from rlx.config.schema import Config
from rlx.data.plan import plan_batch
from rlx.driver.evaluate import part_means
from rlx.driver.experience import (
    Rollouts,
    Samples,
    collect,
    prepare,
)
from rlx.driver.roles import Roles
from rlx.obs.log import phase
from rlx.obs.timers import StepTimer
from rlx.types.layout import ParallelDims
from rlx.types.rollout import (
    SamplingSpec,
    StepReport,
    TrainSample,
    UpdateStats,
)
from rlx.types.weights import WeightManifest


class PPOTrainer:
    """Runs iterations; ``state`` / ``load_state`` are what a checkpoint keeps of the driver."""

    def __init__(
        self,
        config: Config,
        dims: ParallelDims,
        roles: Roles,
        algorithm: Algorithm,
        controller: KLController,
        sampling: SamplingSpec,
    ) -> None:
        self.config, self.dims, self.roles = config, dims, roles
        self.algorithm, self.controller, self.sampling = algorithm, controller, sampling
        self.num_steps_done = 0

    def step(self) -> StepReport:
        """One iteration: prompts to published weights."""
        step, roles, timer = self.num_steps_done + 1, self.roles, StepTimer()
        with phase("rollout", step), timer("rollout"):
            roles.rollout.begin_step(step)
            rollouts = collect(self.config, roles, self.algorithm, self.sampling)
            rollouts.verdicts.warn(f"step {step}", "are left out")
        samples = prepare(self.config, self.algorithm, rollouts)
        plan = plan_batch(
            [len(sample.token_ids) for sample in samples.kept],
            [sample.num_loss_tokens for sample in samples.kept],
            dims=self.dims,
            num_mini_batches=self.config.algorithm.num_mini_batches,
            max_tokens=self.config.batching.max_tokens_per_micro_batch,
        )
        with phase("score", step), timer("score"):
            roles.policy.begin_training()
            roles.policy.load_batch(samples.kept, plan)
            scores: dict[str, float] = {}
            if roles.reference is not None:
                scores |= roles.reference.score()
            scores |= roles.policy.score()
            first = self._teach_critic_first(len(plan.mini_batches))
            if roles.critic is not None:
                scores |= roles.critic.score()
            scores |= roles.policy.compute_advantages(self.controller.coefficient)
        with phase("update", step), timer("update"):
            updates = self._update(len(plan.mini_batches))
            updates["critic"] += first
        with phase("sync", step), timer("sync"):
            manifest = roles.policy.publish(step)
        metrics = self._metrics(rollouts, samples, scores, updates)
        self._adapt_kl(scores, samples.kept)
        self.num_steps_done = step
        return StepReport(step=step, metrics=metrics | _sync_metrics(manifest) | _perf_metrics(timer, samples.kept))

    def publish_start(self) -> None:
        """Bring the engines to the weights that the run starts (or goes on) from."""
        with phase("first sync", self.num_steps_done):
            self.roles.policy.publish(self.num_steps_done)

    def state(self) -> dict[str, object]:
        return {
            "step": self.num_steps_done,
            "kl_coefficient": self.controller.coefficient,
            "prompts": self.roles.prompts.state(),
            "seed": self.config.run.seed,
        }

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on where ``state`` was taken. ValueError when the run's seed differs: its data order would."""
        if state["seed"] != self.config.run.seed:
            raise ValueError(f"run.seed={self.config.run.seed}, but the checkpoint was made with {state['seed']}")
        self.num_steps_done = int(str(state["step"]))
        if self.controller.target is not None:  # a fixed one is the configuration's
            self.controller.coefficient = float(str(state["kl_coefficient"]))
        prompts = state["prompts"]
        assert isinstance(prompts, Mapping)
        self.roles.prompts.load_state(prompts)

    def _teach_critic_first(self, num_mini_batches: int) -> list[UpdateStats]:
        """A process reward model learns from the outcomes before it scores the batch they belong to."""
        critic = self.roles.critic
        if critic is None or not self.algorithm.critic_first:
            return []
        return [critic.update(mini_batch) for mini_batch in range(num_mini_batches)]

    def _update(self, num_mini_batches: int) -> dict[str, list[UpdateStats]]:
        done: dict[str, list[UpdateStats]] = {"policy": [], "critic": []}
        for _ in range(self.config.algorithm.epochs):
            for mini_batch in range(num_mini_batches):
                if self.roles.critic is not None and not self.algorithm.critic_first:
                    done["critic"].append(self.roles.critic.update(mini_batch))
                done["policy"].append(self.roles.policy.update(mini_batch))
        return done

    def _adapt_kl(self, scores: Mapping[str, float], samples: Sequence[TrainSample]) -> None:
        if "kl/ref" in scores:
            tokens_a_sequence = fmean(sample.num_loss_tokens for sample in samples)
            self.controller.update(scores["kl/ref"] * tokens_a_sequence, len(samples))

    def _metrics(
        self,
        rollouts: Rollouts,
        samples: Samples,
        scores: Mapping[str, float],
        updates: Mapping[str, Sequence[UpdateStats]],
    ) -> dict[str, float]:
        groups = rollouts.groups
        rewards = [reward for group in groups for reward in group.rewards or () if reward.valid]
        values = [reward.value for reward in rewards]
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        metrics = {
            "reward/mean": fmean(values),
            "reward/std": pstdev(values),
            "reward/invalid": float(rollouts.verdicts.num_invalid),
            "response/tokens_mean": fmean(trajectory.num_sampled for trajectory in trajectories),
            "response/cut_off_share": fmean(trajectory.is_cut_off for trajectory in trajectories),
            **scores,
            **rollouts.metrics,
            **samples.metrics,
            **self.roles.prompts.metrics(),
        }
        if self.config.algorithm.kl_placement != "none":
            metrics["kl/coefficient"] = self.controller.coefficient
        for source in sorted({group.prompt.source for group in groups} & set(self.config.data.sources)):
            of_source = [r.value for g in groups if g.prompt.source == source for r in g.rewards or () if r.valid]
            if of_source:
                metrics[f"reward/mean/{source}"] = fmean(of_source)
        # A part that is called like one of ours does not replace it.
        metrics = {f"reward/{part}": value for part, value in part_means(rewards).items()} | metrics
        for role, stats in updates.items():
            metrics |= _update_metrics(role, stats)
        return metrics | {f"drops/{reason}": float(count) for reason, count in samples.drops.items()}


_STAT_NAMES = {
    "policy": "loss/policy",
    "ratio": "policy/ratio_mean",
    "clip_fraction": "policy/clip_fraction",
    "approx_kl": "policy/approx_kl",
    "kl_ref": "kl/loss",
    "value": "loss/value",
    "accuracy": "value/accuracy",
    "value_clip_fraction": "value/clip_fraction",
    "value_mean": "value/mean",
    "return_mean": "value/return_mean",
}


def _update_metrics(role: str, stats: Sequence[UpdateStats]) -> dict[str, float]:
    """Means over the optimizer steps of one iteration."""
    if not stats:
        return {}
    metrics = {
        f"{role}/grad_norm": fmean(update.grad_norm for update in stats),
        f"{role}/learning_rate": stats[-1].learning_rate,
        f"{role}/skipped_steps": float(sum(update.skipped for update in stats)),
    }
    for stat, name in _STAT_NAMES.items():
        if stat in stats[0].means:
            metrics[name] = fmean(update.means[stat] for update in stats)
    return metrics


def _sync_metrics(manifest: WeightManifest | None) -> dict[str, float]:
    if manifest is None:
        return {}
    metrics = {"seconds": manifest.seconds, "bytes": float(manifest.num_bytes), "version": float(manifest.version)}
    if manifest.canary is not None:
        canary = manifest.canary
        metrics |= {"canary_difference": canary.difference, "canary_doubts": float(len(canary.doubts))}
        metrics |= {"canary_proved": float(canary.num_proved)}
    return {f"sync/{name}": value for name, value in metrics.items()}


def _perf_metrics(timer: StepTimer, samples: Sequence[TrainSample]) -> dict[str, float]:
    metrics = timer.metrics()
    tokens = sum(len(sample.token_ids) for sample in samples)
    return metrics | {"perf/tokens_per_s": tokens / max(metrics["perf/step_s"], 1e-9)}
