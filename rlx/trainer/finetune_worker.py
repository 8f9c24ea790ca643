"""One trainer rank of fine-tuning: one trained model and, for preference optimisation, a frozen reference.

A step is one mini-batch: ``load_batch``, ``score_reference`` where there is one, ``update``. All methods are collective;
``rank_worker`` has the rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlx.algos.dpo import dpo_loss, ipo_loss
from rlx.algos.reward_model import reward_model_loss
from rlx.algos.sft import sft_loss
from rlx.config.schema import Config
from rlx.models.build import build_model
from rlx.models.classifier import export_classifier, load_score
from rlx.models.heads import value_head
from rlx.models.megatron_io import load_weights
from rlx.obs.log import phase
from rlx.parallel.context import ParallelContext
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import forward_only
from rlx.trainer.batch import RankBatch, position_mask
from rlx.trainer.rank_worker import Means, RankWorker, Trained
from rlx.types.batch import Columns, LossInputs, LossOutput
from rlx.types.layout import BatchPlan
from rlx.types.rollout import TrainSample, UpdateStats


class FinetuneWorker(RankWorker):
    """The model of ``finetune.objective``: a language model (sft, dpo, ipo) or a reward model (rm)."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        super().__init__(config, context)
        self.is_reward_model = config.finetune.objective == "rm"
        self.policy = self._build_policy()
        self.reference = self._build_reference() if config.has_reference else None

    def _trained(self) -> list[tuple[str, Trained]]:
        return [("policy", self.policy)]

    def _build_policy(self) -> Trained:
        folder = self.config.model.path
        with phase("load model"):
            chunks = build_model(self.arch, self.context, self._options, head="score" if self.is_reward_model else "token")
            load_weights(chunks, self.arch, folder, self.context)
            if self.is_reward_model:
                load_score(chunks, self.arch, folder)
            model = self._to_train(chunks, self.config.optimizer, self.config.run.steps)
        head = value_head if self.is_reward_model else self._token_head
        aggregation = "seq-mean-token-mean" if self.config.finetune.is_paired else "token-mean"
        return Trained(model=model, head=head, loss=self._loss, aggregation=aggregation)

    def load_batch(self, samples: Sequence[TrainSample], plan: BatchPlan) -> None:
        self._batch = RankBatch(samples, plan, self.context)
        if self.context.is_last_stage:
            weights = {sample.sample_id: self._weights(sample) for sample in self._batch.samples}
            self._batch.columns = Columns(weights=weights)

    def _weights(self, sample: TrainSample) -> Tensor:
        """What each position counts for, float32 [L]. Each sequence of a pair weighs 2, on its answer or (rm) on its last token:
        its tokens carry half of the pair's loss, and the sum over both is divided by two sequences a pair."""
        if not self.config.finetune.is_paired:
            return position_mask(sample)
        if not self.is_reward_model:
            return position_mask(sample) * (2.0 / sample.num_loss_tokens)
        weights = torch.zeros(len(sample.token_ids))
        weights[-1] = 2.0
        return weights

    def update(self) -> UpdateStats | None:
        """One optimizer step on the loaded batch."""
        with phase("update"):
            return self._update(self.policy, 0)

    def validate(self) -> Means | None:
        """The statistics of the loss on the loaded batch, under the present weights."""
        with phase("validate"):
            outputs = forward_only(self.policy.model.wrapped, self.batch.packs(0), self.policy.head, self.context)
            if not self.context.is_last_stage:
                return None
            totals: dict[str, Tensor] = {}
            for batch, output in outputs:
                for name, stat in self._loss(output, batch).stats.items():
                    totals[name] = totals.get(name, torch.zeros_like(stat)) + stat
            return self._reduce(totals, self.context.groups.dp_cp)

    def _loss(self, outputs: Tensor, batch: LocalBatch) -> LossOutput:
        columns, finetune = batch.pack.columns, self.config.finetune
        weights = batch.local(columns.weights)
        assert weights is not None, "load_batch adds the weights"
        if self.is_reward_model:
            inputs = self._with_sequences(LossInputs(weights_T=weights, values_T=outputs), batch)
            return reward_model_loss(inputs, finetune.center_coefficient)
        inputs = LossInputs(
            weights_T=weights,
            logprobs_T=outputs[0],
            entropy_T=outputs[1],
            ref_logprobs_T=batch.local(columns.ref_logprobs),
        )
        if finetune.objective == "sft":
            return sft_loss(inputs)
        inputs = self._with_sequences(inputs, batch)
        if finetune.objective == "ipo":
            return ipo_loss(inputs, finetune.beta)
        return dpo_loss(inputs, finetune.beta, finetune.label_smoothing)

    def export(self, folder: str) -> None:
        if not self.is_reward_model:
            return super().export(folder)
        with phase("export"):
            chunks = self.policy.model.chunks
            export_classifier(chunks, self.arch, companions=self.companions, target=folder, context=self.context)
