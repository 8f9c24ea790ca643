"""One trainer rank of fine-tuning: one trained model and, for preference optimisation, a frozen reference.

A step is one mini-batch: ``load_batch``, ``score_reference`` where there is one, ``update``. All methods are collective;
``rank_worker`` has the rules.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlx.config.schema import Config
from rlx.models.build import HeadKind
from rlx.obs.log import phase
from rlx.parallel.context import ParallelContext
from rlx.parallel.packing import PackSizes
from rlx.trainer.batch import RankBatch, position_mask
from rlx.trainer.losses import finetune_loss
from rlx.trainer.rank_model import Learning, Means, ModelLoader
from rlx.trainer.scoring import add_ref_logprobs
from rlx.types.batch import Columns
from rlx.types.rollout import UpdateStats
from rlx.types.train_batch import BatchPart, TrainSample


class FinetuneWorker:
    """The model of ``finetune.objective``: a language model (sft, dpo, ipo) or a reward model (rm)."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        self.context = context
        self._objective, self._sizes = config.finetune, PackSizes.of(config.batching, context)
        loader = ModelLoader.of(config.model, config.data.chat_template, config.run, context)
        kind: HeadKind = "score" if self._scores else "token"
        learning = Learning(
            loss=finetune_loss(config.finetune, context.groups.cp),
            aggregation="seq-mean-token-mean" if config.finetune.is_paired else "token-mean",
            optimizer=None if config.evaluation.only else config.optimizer,
            total_steps=config.run.steps,
        )
        with phase("load model"):
            self.policy = loader.load(config.model.path, kind, learning)
        self.reference = None
        if config.has_reference:
            with phase("load reference"):
                self.reference = loader.load_reference(config.model.reference_path or config.model.path, self.policy.arch)
        self._batch: RankBatch | None = None

    @property
    def batch(self) -> RankBatch:
        assert self._batch is not None, "load_batch comes first"
        return self._batch

    def load_batch(self, part: BatchPart) -> None:
        self._batch = RankBatch(part, self.context, self._sizes)
        if self.context.is_last_stage:
            weights = {sample.sample_id: self._weights(sample) for sample in self._batch.samples}
            self._batch.columns = Columns(weights=weights)

    def _weights(self, sample: TrainSample) -> Tensor:
        """What each position counts for, float32 [L]. Each sequence of a pair weighs 2, on its answer or (rm) on its last token:
        its tokens carry half of the pair's loss, and the sum over both is divided by two sequences a pair."""
        if not self._objective.is_paired:
            return position_mask(sample)
        if not self._scores:
            return position_mask(sample) * (2.0 / sample.num_loss_tokens)
        weights = torch.zeros(len(sample))
        weights[-1] = 2.0
        return weights

    @property
    def _scores(self) -> bool:
        """Whether the model is a reward model."""
        return self._objective.objective == "rm"

    def score_reference(self) -> Means | None:
        """The column ``ref_logprobs``."""
        assert self.reference is not None, "this run has no reference"
        add_ref_logprobs(self.batch, self.reference)
        return {} if self.context.is_last_stage else None

    def update(self) -> UpdateStats | None:
        """One optimizer step on the loaded batch."""
        return self.policy.update(self.batch, 0)

    def validate(self) -> Means | None:
        """The statistics of the loss on the loaded batch, under the present weights."""
        return self.policy.measure(self.batch.packs(0))

    def save(self, folder: str) -> None:
        """Write the model below ``folder``, which rank 0 makes."""
        self.policy.save(Path(folder) / "policy")

    def load(self, folder: str) -> None:
        """Restore what ``save`` wrote; in an evaluation alone, the weights."""
        self.policy.load(Path(folder) / "policy")

    def export(self, folder: str) -> None:
        self.policy.export(folder)

    def close(self) -> None:
        """There is nothing beside the ranks' own groups to leave."""
