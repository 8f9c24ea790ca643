"""What every trainer rank does, whatever it learns: build models, hold a batch, update, keep. All methods are collective.

A worker knows nothing of where the driver lives; it is called with plain values and answers with plain values. Token
columns never leave it. Numbers that only the last pipeline stage knows are returned there and None elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlx.arch.families.registry import read_architecture
from rlx.config.schema import Config, OptimizerConfig
from rlx.models.build import BuildOptions, build_model, freeze
from rlx.models.heads import token_head
from rlx.models.hf.companions import Companions
from rlx.models.hf.files import prevailing
from rlx.models.hf.io import export_hf
from rlx.models.megatron_io import load_megatron, load_weights
from rlx.obs.log import phase
from rlx.parallel.checkpoint import load_trainable, save_trainable
from rlx.parallel.context import ParallelContext
from rlx.parallel.context_parallel import sum_over_group
from rlx.parallel.optimizer import Trainable
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import Head, forward_backward, forward_only
from rlx.trainer.batch import RankBatch
from rlx.trainer.weighting import divisors
from rlx.types.batch import LossInputs, LossOutput
from rlx.types.rollout import UpdateStats

Means = dict[str, float]


class ReadOnly:
    """Chunks of a model that is run and never updated: what ``Trainable`` is, without gradients and optimizer."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        freeze(chunks)
        self.chunks = self.wrapped = list(chunks)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """A trained model (in an evaluation alone it is only read), the head it is run with, the loss it is updated by and how
    that loss is aggregated."""

    model: Trainable | ReadOnly
    head: Head
    loss: Callable[[Tensor, LocalBatch], LossOutput]
    aggregation: str


class RankWorker(ABC):
    """The common part; ``temperature`` divides the logits of the policy and of the reference."""

    reference: list[nn.Module] | None

    def __init__(self, config: Config, context: ParallelContext, temperature: float = 1.0) -> None:
        self.config, self.context = config, context
        self.arch = read_architecture(config.model.path)
        model = config.model
        self.companions = Companions.of(model.path, model.tokenizer_path, config.data.chat_template)
        self._options = BuildOptions(
            dtype=model.dtype,
            layer_spec=model.layer_spec,
            recompute=model.recompute,
            seed=config.run.seed,
            moe_aux_loss_coefficient=model.moe_aux_loss_coefficient,
            moe_z_loss_coefficient=model.moe_z_loss_coefficient,
        )
        self._token_head = token_head(context, self.arch, temperature, fp32=model.fp32_head)
        self._batch: RankBatch | None = None

    @abstractmethod
    def _trained(self) -> list[tuple[str, Trained]]:
        """Every trained model by its name in checkpoints; the first is the one that is exported."""

    @property
    def batch(self) -> RankBatch:
        assert self._batch is not None, "load_batch comes first"
        return self._batch

    def _to_train(self, chunks: Sequence[nn.Module], optimizer: OptimizerConfig, total_steps: int) -> Trainable | ReadOnly:
        """The chunks with an optimizer, unless this run only evaluates."""
        return ReadOnly(chunks) if self.config.evaluation.only else Trainable(chunks, optimizer, self.context, total_steps)

    def _build_reference(self) -> list[nn.Module]:
        with phase("load reference"):
            folder = self.config.model.reference_path or self.config.model.path
            arch = read_architecture(folder)
            if arch.vocab_size != self.arch.vocab_size:
                raise ValueError(f"model.reference_path has a vocabulary of {arch.vocab_size}, the policy {self.arch.vocab_size}")
            chunks = build_model(arch, self.context, self._options)
            load_weights(chunks, arch, folder, self.context)
            freeze(chunks)
        return chunks

    def score_reference(self) -> Means | None:
        """The column ``ref_logprobs``."""
        assert self.reference is not None, "this run has no reference"
        with phase("score reference"):
            outputs = forward_only(self.reference, self.batch.all_packs(), self._token_head, self.context)
            if self.context.is_last_stage:
                ref_logprobs = self.batch.whole((batch, out[0]) for batch, out in outputs)
                self.batch.columns = replace(self.batch.columns, ref_logprobs=ref_logprobs)
        return {} if self.context.is_last_stage else None

    def _update(self, trained: Trained, mini_batch: int) -> UpdateStats | None:
        assert isinstance(trained.model, Trainable), "this run only evaluates"
        trained.model.zero_grad()
        totals = forward_backward(
            trained.model.wrapped,
            self.batch.packs(mini_batch),
            trained.head,
            trained.loss,
            divisors=divisors(self.batch, mini_batch, trained.aggregation, self.config),
            context=self.context,
        )
        try:
            result = trained.model.step()
        except FloatingPointError as error:
            odd = ", ".join(name for name, total in totals.items() if not total.isfinite().all())
            raise FloatingPointError(f"{error}; not finite in the loss of this rank: {odd or 'nothing'}") from error
        if not self.context.is_last_stage:
            return None
        return UpdateStats(
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            skipped=result.skipped,
            means=self._reduce(totals, self.context.groups.dp_cp),
        )

    def _with_sequences(self, inputs: LossInputs, batch: LocalBatch) -> LossInputs:
        return replace(
            inputs,
            sequence_T=batch.sequence_t,
            num_sequences=len(batch.pack.sample_ids),
            sum_over_ranks=lambda local: sum_over_group(local, self.context.groups.cp),
        )

    def _reduce(self, stats: Mapping[str, Tensor], group: dist.ProcessGroup) -> Means:
        names = sorted(stats)
        table = torch.stack([stats[name].double() for name in names]).to(self.context.device)
        dist.all_reduce(table, group=group)
        return {name: float(total / count) if count else 0.0 for name, (total, count) in zip(names, table, strict=True)}

    def save(self, folder: str) -> None:
        """Write every trained model below ``folder``, which rank 0 makes."""
        for name, trained in self._trained():
            place = Path(folder) / name
            if self.context.rank == 0:
                place.mkdir(parents=True)
            self.context.barrier()
            assert isinstance(trained.model, Trainable), "this run only evaluates"
            save_trainable(trained.model, place)
            if self.context.rank == 0 and trained.head is self._token_head:
                # A whole language model: converters and exports find what it was used with.
                parameters = (parameter for chunk in trained.model.chunks for parameter in chunk.parameters())
                self.companions.write(place, prevailing((str(p.dtype).removeprefix("torch."), p.numel()) for p in parameters))

    def load(self, folder: str) -> None:
        """Restore what ``save`` wrote; of a model that is only read, its weights."""
        for name, trained in self._trained():
            if isinstance(trained.model, Trainable):
                load_trainable(trained.model, Path(folder) / name)
            else:
                load_megatron(trained.model.chunks, Path(folder) / name, self.context, with_head=True)

    def export(self, folder: str) -> None:
        with phase("export"):
            chunks = self._trained()[0][1].model.chunks
            export_hf(chunks, self.arch, companions=self.companions, target=folder, context=self.context)

    def close(self) -> None:
        """Leave what was joined beside the ranks' own groups."""
        return None
