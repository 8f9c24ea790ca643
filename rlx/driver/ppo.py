"""The training loop: groups to a batch, learn, publish. One iteration reads top to bottom in ``PPOTrainer.step``.

A batch without anything to train on changes nothing: no optimizer step, no publication. Such a step counts as one; too many
in a row end the run. The driver holds samples and plans, never token columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from rlx.algos.kl_controller import KLController
from rlx.config.schema import AlgorithmConfig, RunConfig
from rlx.data.plan import Budget, plan_batch
from rlx.data.samples import RolloutBatch
from rlx.driver.batcher import Batch, Batcher
from rlx.driver.groups import GroupStream
from rlx.driver.roles import Roles
from rlx.obs.log import notice, phase
from rlx.obs.timers import StepTimer
from rlx.types.layout import ParallelDims
from rlx.types.rollout import StepReport, UpdateStats
from rlx.types.weights import WeightManifest


class Learner:
    """Learns from a batch: trains the policy, and the critic where there is one. ``critic_first``: that one learns from a batch
    before it scores it."""

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        budget: Budget,
        dims: ParallelDims,
        roles: Roles,
        controller: KLController,
        *,
        critic_first: bool = False,
    ) -> None:
        self._algorithm, self._budget, self._dims = algorithm, budget, dims
        self._roles, self.controller, self._critic_first = roles, controller, critic_first

    def learn(self, samples: RolloutBatch, step: int, timer: StepTimer) -> dict[str, float]:
        """All optimizer steps on one batch; the KL controller moves after them."""
        roles = self._roles
        plan = plan_batch(
            samples.lengths,
            samples.loss_tokens,
            dims=self._dims,
            num_mini_batches=self._algorithm.num_mini_batches,
            max_tokens=self._budget.max_tokens,
            load=self._budget.load_of([(length,) for length in samples.lengths], samples.images),
        )
        with phase("score", step), timer("score"):
            roles.policy.begin_training()
            roles.policy.load_batch(samples, plan)
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
        metrics = dict(scores)
        if self._algorithm.kl_placement != "none":
            metrics["kl/coefficient"] = self.controller.coefficient
        for role, stats in updates.items():
            metrics |= update_metrics(role, stats)
        self._adapt_kl(scores, samples)
        return metrics

    def _teach_critic_first(self, num_mini_batches: int) -> list[UpdateStats]:
        """A process reward model learns from the outcomes before it scores the batch they belong to."""
        critic = self._roles.critic
        if critic is None or not self._critic_first:
            return []
        return [critic.update(mini_batch) for mini_batch in range(num_mini_batches)]

    def _update(self, num_mini_batches: int) -> dict[str, list[UpdateStats]]:
        done: dict[str, list[UpdateStats]] = {"policy": [], "critic": []}
        for _ in range(self._algorithm.epochs):
            for mini_batch in range(num_mini_batches):
                if self._roles.critic is not None and not self._critic_first:
                    done["critic"].append(self._roles.critic.update(mini_batch))
                done["policy"].append(self._roles.policy.update(mini_batch))
        return done

    def _adapt_kl(self, scores: Mapping[str, float], samples: RolloutBatch) -> None:
        if "kl/ref" in scores:
            self.controller.update(scores["kl/ref"] * fmean(samples.loss_tokens), len(samples))


class PPOTrainer:
    """Runs iterations; ``state`` / ``load_state`` are what a checkpoint keeps of the driver.

    The weights that a step publishes have its number as version; ``weight_version`` is that of the present ones.
    """

    def __init__(self, run: RunConfig, roles: Roles, stream: GroupStream, batcher: Batcher, learner: Learner) -> None:
        self._run, self.roles, self.stream, self.batcher, self.learner = run, roles, stream, batcher, learner
        self.num_steps_done = self.weight_version = 0
        self._empty = EmptySteps(run.max_empty_steps)

    def step(self) -> StepReport:
        """One iteration: prompts to published weights. RuntimeError when too many in a row had nothing to train on."""
        step, timer = self.num_steps_done + 1, StepTimer()
        with phase("rollout", step), timer("rollout"):
            batch = self._next_batch(step)
            batch.verdicts.warn(f"step {step}", "are left out")
        metrics = dict(batch.metrics) | self.stream.metrics()
        if batch.is_empty:
            metrics |= self._empty.count(step, batch)
        else:
            self._empty.clear()
            metrics |= self.learner.learn(batch.samples, step, timer)
            with phase("sync", step), timer("sync"):
                metrics |= sync_metrics(self.roles.policy.publish(step))
            self.weight_version = step
        self.num_steps_done = step
        return StepReport(step=step, metrics=metrics | _perf_metrics(timer, batch.samples))

    def publish_start(self) -> None:
        """Bring the engines to the weights that the run starts (or goes on) from."""
        with phase("first sync", self.num_steps_done):
            self.roles.policy.publish(self.weight_version)

    def state(self) -> dict[str, object]:
        return {
            "step": self.num_steps_done,
            "weight_version": self.weight_version,
            "empty_steps": self._empty.state(),
            "kl_coefficient": self.learner.controller.coefficient,
            "prompts": self.stream.state(),
            "seed": self._run.seed,
        }

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on where ``state`` was taken. ValueError when the run's seed differs: its data order would."""
        if state["seed"] != self._run.seed:
            raise ValueError(f"run.seed={self._run.seed}, but the checkpoint was made with {state['seed']}")
        self.num_steps_done = int(str(state["step"]))
        # Older checkpoints know of no empty steps: each of theirs had published.
        self.weight_version = int(str(state.get("weight_version", self.num_steps_done)))
        empty, prompts = state.get("empty_steps", {}), state["prompts"]
        assert isinstance(empty, Mapping) and isinstance(prompts, Mapping)
        self._empty.load_state(empty)
        if self.learner.controller.target is not None:  # a fixed one is the configuration's
            self.learner.controller.coefficient = float(str(state["kl_coefficient"]))
        self.stream.load_state(prompts)

    def _next_batch(self, step: int) -> Batch:
        batch = None
        while batch is None:
            batch = self.batcher.add(self.stream.next(self.batcher.num_wanted, step), self.weight_version)
        return batch


class EmptySteps:
    """Steps in a row that had nothing to train on, and why: groups left out and answers dropped by reason."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.clear()

    def clear(self) -> None:
        """There was something to train on."""
        self._num = 0
        self._groups: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()

    def count(self, step: int, batch: Batch) -> dict[str, float]:
        """One more, said on the screen; its metric. RuntimeError with the counts of all of them at the limit."""
        self._num += 1
        self._groups.update(batch.left_out)
        self._answers.update(batch.drops)
        why = _reasons(batch.left_out, batch.drops)
        notice(f"step {step}: nothing to train on, {self._num} in a row (run.max_empty_steps={self._limit}): {why}")
        if self._num >= self._limit:
            raise RuntimeError(
                f"nothing to train on in {self._num} steps in a row (run.max_empty_steps={self._limit}), the last of them step"
                f" {step}: {_reasons(self._groups, self._answers)}"
            )
        return {"batch/empty_steps": float(self._num)}

    def state(self) -> dict[str, object]:
        return {"num": self._num, "groups": dict(self._groups), "answers": dict(self._answers)}

    def load_state(self, state: Mapping[str, object]) -> None:
        self.clear()
        if state:
            groups, answers = state["groups"], state["answers"]
            assert isinstance(groups, Mapping) and isinstance(answers, Mapping)
            self._num, self._groups, self._answers = int(str(state["num"])), Counter(groups), Counter(answers)


def _reasons(groups: Mapping[str, int], answers: Mapping[str, int]) -> str:
    """``groups left out: without_signal 32; answers dropped: aborted 1, invalid_reward 7``."""
    parts = [
        f"{what}: " + ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
        for what, counts in (("groups left out", groups), ("answers dropped", answers))
        if counts
    ]
    return "; ".join(parts)


STAT_NAMES = {
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


def update_metrics(role: str, stats: Sequence[UpdateStats]) -> dict[str, float]:
    """Means over the optimizer steps of one iteration."""
    if not stats:
        return {}
    metrics = {
        f"{role}/grad_norm": fmean(update.grad_norm for update in stats),
        f"{role}/learning_rate": stats[-1].learning_rate,
        f"{role}/skipped_steps": float(sum(update.skipped for update in stats)),
    }
    for stat, name in STAT_NAMES.items():
        if stat in stats[0].means:
            metrics[name] = fmean(update.means[stat] for update in stats)
    return metrics


def sync_metrics(manifest: WeightManifest | None) -> dict[str, float]:
    """What a publication took, and what its verification found."""
    if manifest is None:
        return {}
    metrics = {"seconds": manifest.seconds, "bytes": float(manifest.num_bytes), "version": float(manifest.version)}
    metrics["publish_s"] = manifest.unproved_s
    if manifest.canary is not None:
        canary = manifest.canary
        metrics |= {"canary_difference": canary.difference, "canary_doubts": float(len(canary.doubts))}
        metrics |= {"canary_proved": float(canary.num_proved)}
    return {f"sync/{name}": value for name, value in metrics.items()}


def _perf_metrics(timer: StepTimer, batch: RolloutBatch) -> dict[str, float]:
    metrics = timer.metrics()
    return metrics | {"perf/tokens_per_s": batch.num_tokens / max(metrics["perf/step_s"], 1e-9)}
