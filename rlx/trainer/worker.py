"""One trainer rank of reinforcement learning: its models, the batch it works on, the way to the engines. Every method is
collective over the trainer ranks; ``rank_worker`` has the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from rlx.algos.kl import kl_estimate
from rlx.algos.registry import make_algorithm
from rlx.algos.stats import sum_and_count
from rlx.algos.value_loss import FIT, explained_variance, fit
from rlx.arch.families.registry import read_architecture
from rlx.arch.sizes import expected_shapes
from rlx.config.schema import Config
from rlx.config.sharing import offload_level
from rlx.models.build import build_model
from rlx.models.heads import token_head, value_head
from rlx.models.hf.io import stage_weights
from rlx.models.megatron_io import load_weights
from rlx.obs.log import notice, phase
from rlx.parallel.context import ParallelContext
from rlx.parallel.memory import LEVELS, TrainerMemory, describe, usage
from rlx.parallel.optimizer import Trainable
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import forward_only
from rlx.sync.errors import SyncFailure
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.trainer.advantages import add_advantages
from rlx.trainer.batch import RankBatch, of_sample, position_mask
from rlx.trainer.link import EngineLink
from rlx.trainer.rank_worker import Means, RankWorker, ReadOnly, Trained
from rlx.trainer.scoring import score_sequences
from rlx.trainer.weighting import add_importance, add_weights
from rlx.types.batch import LossInputs, LossOutput
from rlx.types.layout import BatchPlan
from rlx.types.rollout import TrainSample, UpdateStats
from rlx.types.weights import WeightManifest


class Worker(RankWorker):
    """Policy, critic and reference, as the configuration asks, and the way to the engines."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        super().__init__(config, context, config.rollout.temperature)
        self.algorithm = make_algorithm(config.algorithm)
        self.policy = self._build_policy()
        self.critic = self._build_critic() if config.trains_critic else None
        self.reference = self._build_reference() if config.has_reference else None
        self.memory = self._make_memory()
        self.engines = self._link()

    # Building

    def _total_steps(self) -> int:
        algorithm = self.config.algorithm
        return self.config.run.steps * algorithm.epochs * algorithm.num_mini_batches

    def _build_policy(self) -> Trained:
        with phase("load policy"):
            chunks = build_model(self.arch, self.context, self._options)
            load_weights(chunks, self.arch, self.config.model.path, self.context)
            model = self._to_train(chunks, self.config.optimizer, self._total_steps())
        aggregation = self.config.algorithm.loss_aggregation
        return Trained(model=model, head=self._token_head, loss=self._policy_loss, aggregation=aggregation)

    def _build_critic(self) -> Trained:
        with phase("load critic"):
            folder = self.config.model.critic_path or self.config.model.path
            arch = read_architecture(folder)
            judges_tokens = self.algorithm.kind == "process"
            chunks = build_model(arch, self.context, self._options, head="token" if judges_tokens else "value")
            load_weights(chunks, arch, folder, self.context)
            model = self._to_train(chunks, self.config.critic_optimizer, self._total_steps())
        if judges_tokens:
            return Trained(model=model, head=self._token_head, loss=self._process_loss, aggregation="seq-mean-token-mean")
        return Trained(model=model, head=value_head, loss=self._value_loss, aggregation="token-mean")

    def _make_memory(self) -> TrainerMemory:
        away_level = LEVELS[offload_level(self.config, self.context.device.type)]
        models = [trained.model for _, trained in self._trained()]
        read_only = [chunk for model in models if isinstance(model, ReadOnly) for chunk in model.chunks]
        trained = [model for model in models if isinstance(model, Trainable)]
        found = TrainerMemory(trained, [*read_only, *(self.reference or ())], away_level)
        shares = self.config.cluster.colocated
        away = f"; in host memory while engines generate: {', '.join(found.away) or 'nothing'}" if shares else ""
        notice(f"memory of trainer rank {self.context.rank}: {describe(found.sizes())}{away}")
        return found

    def memory_metrics(self) -> Means:
        """Memory of the rank that has most of it, for metrics.jsonl; the same on every rank."""
        rows = self.context.gather_objects(usage(self.context.device))
        return {name: max(row[name] for row in rows) for name in rows[0]}

    # Scoring

    def load_batch(self, samples: Sequence[TrainSample], plan: BatchPlan) -> None:
        self._batch = RankBatch(samples, plan, self.context)
        if self.context.is_last_stage:
            add_weights(self._batch, self.config.algorithm.loss_aggregation)

    def score_policy(self) -> Means | None:
        """Old log-probs; entropy, mismatch with the engine and (when the reference scored before) KL to it."""
        with phase("score policy"):
            outputs = forward_only(self.policy.model.wrapped, self.batch.all_packs(), self.policy.head, self.context)
            if not self.context.is_last_stage:
                return None
            old_logprobs = self.batch.whole((batch, out[0]) for batch, out in outputs)
            entropy = self.batch.whole((batch, out[1]) for batch, out in outputs)
            self.batch.columns = replace(self.batch.columns, old_logprobs=old_logprobs, entropy=entropy)
            return self._score_means()

    def score_critic(self) -> Means | None:
        assert self.critic is not None, "this algorithm has no critic"
        with phase("score critic"):
            outputs = forward_only(self.critic.model.wrapped, self.batch.all_packs(), self.critic.head, self.context)
            if self.context.is_last_stage and self.algorithm.kind == "process":
                logprobs = self.batch.whole((batch, out[0]) for batch, out in outputs)
                self.batch.columns = replace(self.batch.columns, process_logprobs=logprobs)
            elif self.context.is_last_stage:
                self.batch.columns = replace(self.batch.columns, values=self.batch.whole(outputs))
        return {} if self.context.is_last_stage else None

    def score_sequences(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The policy's log-probs (temperature 1) of tokens 1..L-1 of each sequence, on every rank."""
        head = token_head(self.context, self.arch, fp32=self.config.model.fp32_head)
        max_tokens = self.config.batching.max_tokens_per_micro_batch
        return score_sequences(self.policy.model.wrapped, head, sequences, self.context, max_tokens)

    def _score_means(self) -> Means:
        columns, samples = self.batch.columns, self.batch.samples
        has_reference = columns.ref_logprobs is not None
        names = ["policy/entropy", "kl/ref"] if has_reference else ["policy/entropy"]
        stats = {name: torch.zeros(2, dtype=torch.float64) for name in names} | add_importance(self.batch, self.config)
        for sample in samples:
            keep = position_mask(sample) != 0
            stats["policy/entropy"] += sum_and_count(of_sample(columns.entropy, sample), keep)
            if has_reference:
                old, ref = of_sample(columns.old_logprobs, sample), of_sample(columns.ref_logprobs, sample)
                stats["kl/ref"] += sum_and_count(kl_estimate(old, ref, "k1"), keep)
        return self._reduce(stats, self.context.groups.dp)

    # Learning

    def compute_advantages(self, kl_coefficient: float) -> Means | None:
        if not self.context.is_last_stage:
            return None
        with phase("advantages"):
            add_advantages(self.batch, self.algorithm, self.config.algorithm, kl_coefficient, self._sum_over_data)
            return self._advantage_means()

    def _advantage_means(self) -> Means:
        columns, has_values = self.batch.columns, self.algorithm.kind == "critic"
        names = ("advantages/mean", *(FIT if has_values else ()))
        stats = {name: torch.zeros(2, dtype=torch.float64) for name in names}
        for sample in self.batch.samples:
            mask = position_mask(sample)
            stats["advantages/mean"] += sum_and_count(of_sample(columns.advantages, sample), mask != 0)
            if has_values:
                found = fit(of_sample(columns.values, sample), of_sample(columns.returns, sample), mask)
                stats |= {name: stats[name] + stat for name, stat in found.items()}
        means = self._reduce(stats, self.context.groups.dp)
        explained = explained_variance(means) if has_values else None
        fits = {} if explained is None else {"critic/explained_variance": explained}
        return {"advantages/mean": means["advantages/mean"], **fits}

    def update_policy(self, mini_batch: int) -> UpdateStats | None:
        with phase("update policy"):
            return self._update(self.policy, mini_batch)

    def update_critic(self, mini_batch: int) -> UpdateStats | None:
        assert self.critic is not None, "this algorithm has no critic"
        with phase("update critic"):
            return self._update(self.critic, mini_batch)

    def _policy_loss(self, outputs: Tensor, batch: LocalBatch) -> LossOutput:
        columns = batch.pack.columns
        weights = batch.local(columns.weights)
        assert weights is not None, "load_batch adds the weights"
        inputs = LossInputs(
            weights_T=weights,
            importance_T=batch.local(columns.importance),
            logprobs_T=outputs[0],
            entropy_T=outputs[1],
            old_logprobs_T=batch.local(columns.old_logprobs),
            ref_logprobs_T=batch.local(columns.ref_logprobs),
            advantages_T=batch.local(columns.advantages),
        )
        return self.algorithm.policy_loss(self._with_sequences(inputs, batch))

    def _process_loss(self, outputs: Tensor, batch: LocalBatch) -> LossOutput:
        columns = batch.pack.columns
        weights = batch.local(columns.sequence_weights)
        assert self.algorithm.value_loss is not None and weights is not None
        inputs = LossInputs(
            weights_T=weights,
            logprobs_T=outputs[0],
            ref_logprobs_T=batch.local(columns.ref_logprobs),
            returns_T=batch.local(columns.outcomes),
        )
        return self.algorithm.value_loss(self._with_sequences(inputs, batch))

    def _value_loss(self, outputs: Tensor, batch: LocalBatch) -> LossOutput:
        assert self.algorithm.value_loss is not None
        columns = batch.pack.columns
        inputs = LossInputs(
            weights_T=batch.loss_mask_t,
            values_T=outputs,
            old_values_T=batch.local(columns.values),
            returns_T=batch.local(columns.returns),
        )
        return self.algorithm.value_loss(inputs)

    def _sum_over_data(self, sums: Tensor) -> Tensor:
        sums = sums.to(self.context.device)
        dist.all_reduce(sums, group=self.context.groups.dp)
        return sums.cpu()

    # Publishing

    def begin_training(self, endpoints: Sequence[Endpoint], tags: Sequence[str] | None = None) -> SyncFailure | None:
        """Engines on our devices pause and give back memory (``tags`` of it; None: all they give), and ours comes back."""
        with phase("make room"):
            return self.engines.begin_training(endpoints, tags)

    def end_training(self, endpoints: Sequence[Endpoint]) -> SyncFailure | None:
        """Undo ``begin_training`` with engines that kept their weights."""
        with phase("make room"):
            return self.engines.end_training(endpoints)

    def make_room(self) -> None:
        """Put away what is put away while engines have our devices, for engines that are about to start."""
        with phase("make room"):
            self.engines.make_room()

    def publish(self, version: int, endpoints: Sequence[Endpoint]) -> WeightManifest | SyncFailure:
        """Bring these engines to the present weights; see ``EngineLink.publish``."""
        with phase("publish"):
            return self.engines.publish(version, endpoints)

    def close(self) -> None:
        """Leave the engines' groups."""
        self.engines.close()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        self.memory.bring_back(("weights",))
        return stage_weights(self.policy.model.chunks, self.arch, self.context)

    def _link(self) -> EngineLink:
        dtype = self.config.model.dtype if self.config.rollout.dtype == "auto" else self.config.rollout.dtype
        canary = CanarySpec(
            vocab_size=self.arch.vocab_size,
            seed=self.config.run.seed,
            dtype="fp32" if dtype == "fp32" else "bf16",
            score_on_trainer=self.score_sequences,
            export=self._weights,
        )
        return EngineLink(self.config, self.context, expected_shapes(self.arch), canary, self.memory)

    # Keeping

    def _trained(self) -> list[tuple[str, Trained]]:
        found = [("policy", self.policy)]
        return found if self.critic is None else [*found, ("critic", self.critic)]
