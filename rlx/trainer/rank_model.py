"""One model on a trainer rank, whatever its role: policy, critic, reference, reward model, or what ``rlx score`` runs.

All methods are collective over the ranks that hold the model. Numbers that only the last pipeline stage knows are returned
there and None elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import read_architecture
from rlx.config.schema import ModelConfig, OptimizerConfig, RunConfig
from rlx.data.images.pixels import image_file, image_folder
from rlx.models.build import BuildOptions, HeadKind, build_model, freeze
from rlx.models.classifier import export_classifier, load_score
from rlx.models.heads import token_head, value_head
from rlx.models.hf.companions import Companions
from rlx.models.hf.files import prevailing
from rlx.models.hf.io import Room, constant_names, export_hf, no_room, stage_weights
from rlx.models.megatron_io import load_megatron, load_weights
from rlx.parallel.checkpoint import load_trainable, save_trainable
from rlx.parallel.context import ParallelContext
from rlx.parallel.optimizer import Trainable
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import Head, Loss, forward_backward, forward_only
from rlx.trainer.batch import RankBatch
from rlx.trainer.weighting import divisors
from rlx.types.batch import MicroBatch
from rlx.types.rollout import UpdateStats

Means = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learning:
    """What a model learns by. Without an optimizer its loss is only measured.

    loss         summed over tokens
    aggregation  how that sum becomes one number; ``constant``: tokens a sequence, of the aggregation of that name
    total_steps  optimizer steps of the whole run
    """

    loss: Loss
    aggregation: str
    constant: int = 1
    optimizer: OptimizerConfig | None = None
    total_steps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankModel:
    """This rank's part of one model, and what is done with it.

    chunks      the bare modules: one, or one a virtual pipeline stage
    kind        what the output layer gives; ``head`` runs a chunk and computes it
    companions  the files that go along with its weights
    learning    None for a model that has no loss; ``trainable`` None for one that is only read
    """

    arch: Architecture
    chunks: Sequence[nn.Module]
    head: Head
    context: ParallelContext
    companions: Companions
    kind: HeadKind = "token"
    learning: Learning | None = None
    trainable: Trainable | None = None

    def score(self, packs: Sequence[MicroBatch]) -> list[tuple[LocalBatch, Tensor]]:
        """The head's outputs of each micro-batch on the last pipeline stage, nothing elsewhere. No gradients."""
        return forward_only(self._run_chunks, packs, self.head, self.context)

    def update(self, batch: RankBatch, mini_batch: int) -> UpdateStats | None:
        """One optimizer step on a mini-batch. FloatingPointError, before any weight is changed, for gradients that are not
        finite."""
        trainable, learning = self._trained()
        trainable.zero_grad()
        totals = forward_backward(
            trainable.wrapped,
            batch.packs(mini_batch),
            self.head,
            learning.loss,
            divisors=divisors(batch, mini_batch, learning.aggregation, learning.constant),
            context=self.context,
        )
        try:
            result = trainable.step()
        except FloatingPointError as error:
            odd = ", ".join(name for name, total in totals.items() if not total.isfinite().all())
            raise FloatingPointError(f"{error}; not finite in the loss of this rank: {odd or 'nothing'}") from error
        if not self.context.is_last_stage:
            return None
        return UpdateStats(
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            skipped=result.skipped,
            means=reduced(totals, self.context.groups.dp_cp, self.context.device),
        )

    def measure(self, packs: Sequence[MicroBatch]) -> Means | None:
        """The statistics of the loss under the present weights."""
        assert self.learning is not None, "this model has no loss"
        outputs = self.score(packs)
        if not self.context.is_last_stage:
            return None
        totals: dict[str, Tensor] = {}
        for batch, output in outputs:
            for name, stat in self.learning.loss(output, batch).stats.items():
                totals[name] = totals.get(name, torch.zeros_like(stat)) + stat
        return reduced(totals, self.context.groups.dp_cp, self.context.device)

    def weights(self, *, everywhere: bool = False, room: Room = no_room) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors of this pipeline stage under their Hugging Face names: on its sender, or ``everywhere`` in the stage."""
        return stage_weights(self.chunks, self.arch, self.context, everywhere=everywhere, room=room)

    def constant_weights(self) -> frozenset[str]:
        """Names of what a model that learns never changes, of all stages. Collective."""
        mine = frozenset() if self.trainable is None else constant_names(self.chunks, self.arch, self.context)
        return frozenset[str]().union(*self.context.gather_objects(mine))

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into ``folder``, which rank 0 makes."""
        if self.context.rank == 0:
            folder.mkdir(parents=True)
        self.context.barrier()
        save_trainable(self._trained()[0], folder)
        if self.context.rank == 0 and self.kind == "token":
            # A whole language model: converters and exports find what it was used with.
            parameters = (parameter for chunk in self.chunks for parameter in chunk.parameters())
            self.companions.write(folder, prevailing((str(p.dtype).removeprefix("torch."), p.numel()) for p in parameters))

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote; of a model that is only read, its weights."""
        if self.trainable is None:
            load_megatron(self.chunks, folder, self.context, with_head=True)
        else:
            load_trainable(self.trainable, folder)

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder: a language model, or a classifier where the output layer gives scores."""
        write = export_classifier if self.kind == "score" else export_hf
        write(self.chunks, self.arch, companions=self.companions, target=folder, context=self.context)

    @property
    def _run_chunks(self) -> Sequence[nn.Module]:
        """What Megatron's schedules run: the chunks, wrapped where they learn."""
        return self.chunks if self.trainable is None else self.trainable.wrapped

    def _trained(self) -> tuple[Trainable, Learning]:
        assert self.trainable is not None and self.learning is not None, "this model is only read"
        return self.trainable, self.learning


class ModelLoader:
    """Loads the models of one run. They share how they compute and what goes along with their weights; ``temperature`` divides
    their logits."""

    def __init__(self, options: BuildOptions, companions: Companions, context: ParallelContext, temperature: float = 1.0) -> None:
        self.options, self.companions, self.context = options, companions, context
        self._temperature = temperature

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        chat_template: str | None,
        run: RunConfig,
        context: ParallelContext,
        temperature: float = 1.0,
    ) -> Self:
        """As a configuration says. The run's seed draws the start values of heads that no folder holds."""
        options = BuildOptions(
            precision=model.precision,
            layer_spec=model.layer_spec,
            recompute=model.recompute,
            recompute_layers=model.recompute_layers,
            seed=run.seed,
            moe_aux_loss_coefficient=model.moe_aux_loss_coefficient,
            moe_z_loss_coefficient=model.moe_z_loss_coefficient,
            vision=model.vision,
            images=partial(image_file, image_folder(run.dir)),
        )
        companions = Companions.of(model.path, model.tokenizer_path, chat_template)
        return cls(options, companions, context, temperature)

    def load(self, folder: str, kind: HeadKind = "token", learning: Learning | None = None) -> RankModel:
        """The folder's model, read-only unless ``learning`` brings an optimizer."""
        arch, context = read_architecture(folder), self.context
        is_trained = learning is not None and learning.optimizer is not None
        options = self.options if is_trained else replace(self.options, vision="frozen")
        chunks = build_model(arch, context, options, head=kind)
        load_weights(chunks, arch, folder, context)
        if kind == "score":
            load_score(chunks, arch, folder)
        trainable = None
        if learning is not None and learning.optimizer is not None:
            trainable = Trainable(chunks, learning.optimizer, context, learning.total_steps)
        else:
            freeze(chunks)
        head = self._token_head(arch, self._temperature) if kind == "token" else value_head
        return RankModel(
            arch=arch,
            chunks=chunks,
            head=head,
            context=context,
            companions=self.companions,
            kind=kind,
            learning=learning,
            trainable=trainable,
        )

    def load_reference(self, folder: str, policy: Architecture) -> RankModel:
        """A model that judges the policy's tokens. ValueError when it knows others."""
        vocab_size = read_architecture(folder).vocab_size
        if vocab_size != policy.vocab_size:
            raise ValueError(f"model.reference_path has a vocabulary of {vocab_size}, the policy {policy.vocab_size}")
        return self.load(folder)

    def untempered(self, model: RankModel) -> RankModel:
        """The same language model, its logits as they are."""
        return replace(model, head=self._token_head(model.arch, 1.0))

    def _token_head(self, arch: Architecture, temperature: float) -> Head:
        return token_head(self.context, arch, temperature, fp32=self.options.precision.fp32_head)


def reduced(stats: Mapping[str, Tensor], group: dist.ProcessGroup, device: torch.device) -> Means:
    """Means of sums and counts [2] over the group's ranks; each must know the same names."""
    names = sorted(stats)
    table = torch.stack([stats[name].double() for name in names]).to(device)
    dist.all_reduce(table, group=group)
    return {name: float(total / count) if count else 0.0 for name, (total, count) in zip(names, table, strict=True)}
