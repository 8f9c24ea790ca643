"""One trainer rank of reinforcement learning: its models, the batch it works on, the way to the engines. Every method is
collective over the trainer ranks; ``rank_worker`` has the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlx.algos.kl import kl_estimate
from rlx.algos.registry import make_algorithm
from rlx.algos.stats import sum_and_count
from rlx.algos.value_loss import FIT, explained_variance, fit
from rlx.arch.engine_format import QUANTIZATION, converted_names
from rlx.arch.sizes import expected_shapes
from rlx.config.schema import Config, ModelConfig, OptimizerConfig
from rlx.config.sharing import offload_level
from rlx.data.images.pixels import image_folder
from rlx.obs.log import notice, phase
from rlx.parallel.context import ParallelContext
from rlx.parallel.memory import LEVELS, TrainerMemory, describe, usage
from rlx.parallel.packing import PackSizes
from rlx.rollout.images import ImageStore
from rlx.sync.errors import SyncFailure
from rlx.sync.group import Endpoint
from rlx.sync.proof.canary import CanarySpec
from rlx.trainer.advantages import add_advantages
from rlx.trainer.batch import RankBatch, of_sample, position_mask
from rlx.trainer.link import EngineLink, LinkOptions, sync_folder
from rlx.trainer.losses import policy_loss, process_loss, value_loss
from rlx.trainer.rank_model import Learning, Means, ModelLoader, RankModel, reduced
from rlx.trainer.scoring import add_ref_logprobs, score_sequences
from rlx.trainer.weighting import add_importance, add_weights
from rlx.types.precision import Precision
from rlx.types.rollout import ImageSpan, UpdateStats
from rlx.types.train_batch import BatchPart
from rlx.types.weights import WeightManifest


class Worker:
    """Policy, critic and reference, as the configuration asks, and the way to the engines.

    ``sharers``: by engine, the trainer rank on the device of each of its ranks.
    """

    def __init__(self, config: Config, context: ParallelContext, sharers: Mapping[int, Sequence[int]] | None = None) -> None:
        self.context = context
        self._update_rule, self._max_tokens = config.algorithm, config.batching.max_tokens_per_micro_batch
        self._sizes = PackSizes.of(config.batching, context)
        self.algorithm = make_algorithm(config.algorithm)
        self._batch: RankBatch | None = None
        model, total_steps = config.model, config.run.steps * config.algorithm.epochs * config.algorithm.num_mini_batches
        loader = ModelLoader.of(model, config.data.chat_template, config.run, context, config.rollout.temperature)
        learning = Learning(
            loss=policy_loss(self.algorithm.policy_loss, context.groups.cp),
            aggregation=config.algorithm.loss_aggregation,
            constant=config.algorithm.loss_constant or config.rollout.max_new_tokens,
            optimizer=None if config.evaluation.only else config.optimizer,
            total_steps=total_steps,
        )
        with phase("load policy"):
            self.policy = loader.load(model.path, learning=learning)
        self._untempered = loader.untempered(self.policy)
        self.critic = self.reference = None
        if config.trains_critic:
            self.critic = self._load_critic(loader, model, config.critic_optimizer, total_steps)
        if config.has_reference:
            with phase("load reference"):
                self.reference = loader.load_reference(model.reference_path or model.path, self.policy.arch)
        shares = config.cluster.colocated
        self.memory = self._make_memory(LEVELS[offload_level(config, context.device.type)], shares)
        has_fp8, beside = config.rollout.fp8, loader.companions
        companions = replace(beside, quantization=QUANTIZATION) if has_fp8 else beside
        options = LinkOptions(
            sync=config.sync,
            transport=config.transport,
            folder=sync_folder(config.run.dir, config.sync.dir, companions) if config.transport == "disk" else None,
            shares=shares,
            constant=self.policy.constant_weights(),
            fp8=converted_names(self.policy.arch) if has_fp8 else frozenset(),
            sharers=sharers or {},
            weight_bytes=model.precision.weight_bytes,
        )
        canary = self._canary(config.run.seed, config.engine_precision, image_folder(config.run.dir))
        self.engines = EngineLink(options, context, expected_shapes(self.policy.arch), canary, self.memory)

    # Building

    def _load_critic(self, loader: ModelLoader, model: ModelConfig, optimizer: OptimizerConfig, total_steps: int) -> RankModel:
        """A model of values, or (PRIME) a language model whose log-probs are process rewards."""
        function, judges_tokens = self.algorithm.value_loss, self.algorithm.kind == "process"
        assert function is not None, "this algorithm has no critic"
        learning = Learning(
            loss=process_loss(function, self.context.groups.cp) if judges_tokens else value_loss(function),
            aggregation="seq-mean-token-mean" if judges_tokens else "token-mean",
            optimizer=optimizer,
            total_steps=total_steps,
        )
        with phase("load critic"):
            return loader.load(model.critic_path or model.path, "token" if judges_tokens else "value", learning)

    def _make_memory(self, away: Sequence[str], shares: bool) -> TrainerMemory:
        models = [model for model in (self.policy, self.critic, self.reference) if model is not None]
        trained = [model.trainable for model in models if model.trainable is not None]
        read_only = [chunk for model in models if model.trainable is None for chunk in model.chunks]
        found = TrainerMemory(trained, read_only, away)
        put_away = f"; in host memory while engines generate: {', '.join(found.away) or 'nothing'}" if shares else ""
        notice(f"memory of trainer rank {self.context.rank}: {describe(found.sizes())}{put_away}")
        return found

    def _canary(self, seed: int, engines: Precision, images: Path) -> CanarySpec:
        vision = self.policy.arch.vision
        return CanarySpec(
            vocab_size=self.policy.arch.vocab_size,
            seed=seed,
            precision=engines,
            score_on_trainer=self.score_sequences,
            export=self._weights,
            images=None if vision is None else ImageStore(folder=images, vision=vision),
        )

    @property
    def batch(self) -> RankBatch:
        assert self._batch is not None, "load_batch comes first"
        return self._batch

    def memory_metrics(self) -> Means:
        """Memory of the rank that has most of it, for metrics.jsonl; the same on every rank."""
        rows = self.context.gather_objects(usage(self.context.device))
        return {name: max(row[name] for row in rows) for name in rows[0]}

    # Scoring

    def load_batch(self, part: BatchPart) -> None:
        self._batch = RankBatch(part, self.context, self._sizes)
        if self.context.is_last_stage:
            add_weights(self._batch, self._update_rule.loss_aggregation)

    def score_reference(self) -> Means | None:
        """The column ``ref_logprobs``."""
        assert self.reference is not None, "this run has no reference"
        add_ref_logprobs(self.batch, self.reference)
        return {} if self.context.is_last_stage else None

    def score_policy(self) -> Means | None:
        """Old log-probs; entropy, mismatch with the engine and (when the reference scored before) KL to it."""
        outputs = self.policy.score(self.batch.all_packs())
        if not self.context.is_last_stage:
            return None
        old_logprobs = self.batch.whole((batch, out[0]) for batch, out in outputs)
        entropy = self.batch.whole((batch, out[1]) for batch, out in outputs)
        self.batch.columns = replace(self.batch.columns, old_logprobs=old_logprobs, entropy=entropy)
        return self._score_means()

    def score_critic(self) -> Means | None:
        assert self.critic is not None, "this algorithm has no critic"
        outputs = self.critic.score(self.batch.all_packs())
        if not self.context.is_last_stage:
            return None
        if self.critic.kind == "token":
            logprobs = self.batch.whole((batch, out[0]) for batch, out in outputs)
            self.batch.columns = replace(self.batch.columns, process_logprobs=logprobs)
        else:
            self.batch.columns = replace(self.batch.columns, values=self.batch.whole(outputs))
        return {}

    def score_sequences(self, sequences: Sequence[Sequence[int]], images: Sequence[Sequence[ImageSpan]]) -> list[list[float]]:
        """The policy's log-probs (temperature 1) of tokens 1..L-1 of each sequence, on every rank."""
        return score_sequences(self._untempered, sequences, self._max_tokens, images)

    def _score_means(self) -> Means:
        columns, samples = self.batch.columns, self.batch.samples
        has_reference = columns.ref_logprobs is not None
        names = ["policy/entropy", "kl/ref"] if has_reference else ["policy/entropy"]
        stats = {name: torch.zeros(2, dtype=torch.float64) for name in names} | add_importance(self.batch, self._update_rule)
        for sample in samples:
            keep = position_mask(sample) != 0
            stats["policy/entropy"] += sum_and_count(of_sample(columns.entropy, sample), keep)
            if has_reference:
                old, ref = of_sample(columns.old_logprobs, sample), of_sample(columns.ref_logprobs, sample)
                stats["kl/ref"] += sum_and_count(kl_estimate(old, ref, "k1"), keep)
        return self._over_data(stats)

    # Learning

    def compute_advantages(self, kl_coefficient: float) -> Means | None:
        if not self.context.is_last_stage:
            return None
        add_advantages(self.batch, self.algorithm, self._update_rule, kl_coefficient, self._sum_over_data)
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
        means = self._over_data(stats)
        explained = explained_variance(means) if has_values else None
        fits = {} if explained is None else {"critic/explained_variance": explained}
        return {"advantages/mean": means["advantages/mean"], **fits}

    def update_policy(self, mini_batch: int) -> UpdateStats | None:
        return self.policy.update(self.batch, mini_batch)

    def update_critic(self, mini_batch: int) -> UpdateStats | None:
        assert self.critic is not None, "this algorithm has no critic"
        return self.critic.update(self.batch, mini_batch)

    def _over_data(self, stats: Mapping[str, Tensor]) -> Means:
        return reduced(stats, self.context.groups.dp, self.context.device)

    def _sum_over_data(self, sums: Tensor) -> Tensor:
        sums = sums.to(self.context.device)
        dist.all_reduce(sums, group=self.context.groups.dp)
        return sums.cpu()

    # Publishing

    def begin_training(self, endpoints: Sequence[Endpoint], tags: Sequence[str] | None = None) -> SyncFailure | None:
        """Engines on our devices pause and give back memory (``tags`` of it; None: all they give), and ours comes back."""
        return self.engines.begin_training(endpoints, tags)

    def end_training(self, endpoints: Sequence[Endpoint]) -> SyncFailure | None:
        """Undo ``begin_training`` with engines that kept their weights."""
        return self.engines.end_training(endpoints)

    def make_room(self) -> None:
        """Put away what is put away while engines have our devices, for engines that are about to start."""
        self.engines.make_room()

    def publish(self, version: int, endpoints: Sequence[Endpoint]) -> WeightManifest | SyncFailure:
        """Bring these engines to the present weights; see ``EngineLink.publish``."""
        return self.engines.publish(version, endpoints)

    def close(self) -> None:
        """Leave the engines' groups."""
        self.engines.close()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        self.memory.bring_back(("weights",))
        return self.policy.weights(everywhere=self.engines.transport == "ipc", room=self.engines.room)

    # Keeping

    def save(self, folder: str) -> None:
        """Write every trained model below ``folder``, which rank 0 makes."""
        for role, model in self._kept().items():
            model.save(Path(folder) / role)

    def load(self, folder: str) -> None:
        """Restore what ``save`` wrote; in an evaluation alone, the policy's weights."""
        for role, model in self._kept().items():
            model.load(Path(folder) / role)

    def export(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder."""
        self.policy.export(folder)

    def _kept(self) -> dict[str, RankModel]:
        """The models of a checkpoint, by their names in it."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})
