"""Every mixture-of-experts family under several layouts: log-probs, gradients of a next-token loss, export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import read_architecture
from rlx.config.schema import OptimizerConfig
from rlx.data.plan import plan_batch
from rlx.models.build import BuildOptions, build_model
from rlx.models.heads import token_head
from rlx.models.hf.companions import Companions
from rlx.models.hf.io import export_hf, load_hf, stage_weights
from rlx.parallel.context import ParallelContext
from rlx.parallel.optimizer import Trainable
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import Divisors, forward_backward
from rlx.trainer.batch import RankBatch
from rlx.trainer.rank_model import RankModel
from rlx.trainer.scoring import score_sequences
from rlx.types.batch import LossOutput
from tests.batches import part_for, train_sample
from tests.dist.programs.layouts import context_of, main

MAX_TOKENS = 24


def gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter that is held still has none."""
    return parameter.main_grad.detach() if parameter.requires_grad else torch.zeros_like(parameter)


def gradients(model: Trainable, arch: Architecture, sequences: list[list[int]], context: ParallelContext) -> dict[str, Tensor]:
    """Of the mean next-token loss, whole, on every rank."""
    samples = [
        train_sample(sample_id=index, token_ids=tokens, loss_mask=(0, *(1,) * (len(tokens) - 1)))
        for index, tokens in enumerate(sequences)
    ]
    counts = [sample.num_loss_tokens for sample in samples]
    plan = plan_batch([len(tokens) for tokens in sequences], counts, dims=context.dims, num_mini_batches=1, max_tokens=MAX_TOKENS)
    batch = RankBatch(part_for(samples, plan, context.dp_rank), context)

    def loss(outputs: Tensor, local: LocalBatch) -> LossOutput:
        return LossOutput(loss=-(outputs[0] * local.loss_mask_t).sum(), stats={})

    model.zero_grad()
    forward_backward(
        model.wrapped,
        batch.packs(0),
        token_head(context, arch),
        loss,
        divisors=Divisors(loss=sum(counts), loss_tokens=sum(counts)),
        context=context,
    )
    found = {name: tensor.clone() for name, tensor in stage_weights(model.chunks, arch, context, gradient)}
    return {name: tensor for part in context.gather_objects(found) for name, tensor in part.items()}


def run_family(folder: Path, sequences: list[list[int]], context: ParallelContext, options: dict[str, Any]) -> dict[str, Any]:
    arch = read_architecture(folder)
    chunks = build_model(arch, context, BuildOptions(**options))
    load_hf(chunks, arch, folder, context)
    model = Trainable(chunks, OptimizerConfig(distributed=False), context, 1)
    whole = RankModel(arch=arch, chunks=chunks, head=token_head(context, arch), context=context, companions=Companions.of(folder))
    rows = score_sequences(whole, sequences, MAX_TOKENS)
    grads = gradients(model, arch, sequences, context)
    dims = dataclasses.asdict(context.dims)
    export = folder.parent / "exports" / f"{folder.name}-{'-'.join(f'{k}{v}' for k, v in dims.items())}"
    if not options:
        export_hf(chunks, arch, companions=Companions.of(folder), target=export, context=context)
    return {"logprobs": rows, "grads": grads, "export": str(export)}


def program(arguments: dict[str, Any], world_size: int) -> None:
    results: dict[str, Any] = {}
    for name, layout in arguments["layouts"].items():
        layout = dict(layout)
        options, families = layout.pop("options", {}), layout.pop("families", arguments["families"])
        with context_of(layout, world_size) as context:
            results[name] = {
                family: run_family(Path(arguments["folder"]) / family, arguments["sequences"], context, options)
                for family in families
            }
            if context.rank == 0:
                torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
