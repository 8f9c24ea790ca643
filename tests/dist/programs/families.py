"""Every dense family under several layouts: log-probs and gradients against transformers, weights in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch import Tensor, nn

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import read_architecture
from rlx.config.schema import OptimizerConfig
from rlx.data.collate import collate
from rlx.models.build import BuildOptions, build_model
from rlx.models.heads import token_head
from rlx.models.hf.companions import Companions
from rlx.models.hf.io import export_hf, load_hf, stage_weights
from rlx.parallel.context import ParallelContext
from rlx.parallel.optimizer import Trainable
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import Divisors, forward_backward
from rlx.trainer.rank_model import RankModel
from rlx.trainer.scoring import score_sequences
from rlx.types.batch import LossOutput
from rlx.types.precision import precision_of
from tests.batches import train_sample
from tests.dist.family_folders import folder_of, sequences
from tests.dist.programs.layouts import context_of, main

PACK_TOKENS = 48  # several sequences a pack, several packs


def merged(found: dict[str, Tensor], context: ParallelContext) -> dict[str, Tensor]:
    return {name: tensor for part in context.gather_objects(found) for name, tensor in part.items()}


def packs_of(sequences: list[list[int]], context: ParallelContext) -> list[Any]:
    packs, chosen = [], []
    for index, tokens in enumerate(sequences):
        chosen.append(train_sample(sample_id=index, token_ids=tokens, loss_mask=(1,) * len(tokens)))
        if sum(len(sample) for sample in chosen) >= PACK_TOKENS or index == len(sequences) - 1:
            packs.append(collate(chosen, [sample.sample_id for sample in chosen], context.dims))
            chosen = []
    return packs


def gradients(model: Trainable, arch: Architecture, sequences: list[list[int]], context: ParallelContext) -> dict[str, Tensor]:
    """Gradients of the mean next-token loss, whole, under Hugging Face names, on every rank."""

    def loss(outputs: Tensor, batch: LocalBatch) -> LossOutput:
        return LossOutput(loss=-(outputs[0] * batch.loss_mask_t).sum(), stats={})

    model.zero_grad()
    total = sum(len(tokens) - 1 for tokens in sequences)
    forward_backward(
        model.wrapped,
        packs_of(sequences, context),
        token_head(context, arch),
        loss,
        divisors=Divisors(loss=total, loss_tokens=total),
        context=context,
    )
    return merged(
        {name: grad.clone() for name, grad in stage_weights(model.chunks, arch, context, lambda p: p.main_grad.detach())}, context
    )


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The worst relative difference and where; a missing or an extra tensor is infinitely wrong."""
    odd = sorted(found.keys() ^ expected.keys())
    if odd:
        return float("inf"), f"only on one side: {odd[:4]}"
    return max(
        (float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12)), name)
        for name in expected
    )


def unlike(found: dict[str, Tensor], folder: Path) -> list[str]:
    """Tensors that are not what the folder holds, bit for bit."""
    source = load_file(folder / "model.safetensors")
    both = found.keys() & source.keys()
    odd = {name for name in both if found[name].dtype != source[name].dtype or not torch.equal(found[name], source[name])}
    return sorted(odd | (found.keys() ^ source.keys()))


def unlike_everywhere(
    chunks: Sequence[nn.Module], arch: Architecture, found: dict[str, Tensor], context: ParallelContext
) -> list[str]:
    """What ranks get otherwise where every rank of a stage gets all of its tensors: another value, another order."""
    own = list(stage_weights(chunks, arch, context, everywhere=True))
    odd = [f"{name} on rank {context.rank}" for name, tensor in own if not torch.equal(tensor, found[name])]
    orders = context.gather_objects((context.pp_rank, [name for name, _ in own], odd))
    first = {stage: names for stage, names, _ in reversed(orders)}
    others = [f"the order of rank {rank}" for rank, (stage, names, _) in enumerate(orders) if names != first[stage]]
    missing = found.keys() ^ {name for names in first.values() for name in names}
    return [name for _, _, odd in orders for name in odd] + others + sorted(missing)


def in_and_out(folder: Path, dtype: str, context: ParallelContext, exported_to: Path | None) -> list[str]:
    """What one way into Megatron and out again changes."""
    arch = read_architecture(folder)
    chunks = build_model(arch, context, BuildOptions(precision=precision_of(dtype)))
    load_hf(chunks, arch, folder, context)
    if exported_to is None:
        found = merged({name: tensor.clone() for name, tensor in stage_weights(chunks, arch, context)}, context)
        if odd := unlike_everywhere(chunks, arch, found, context):
            return odd
    else:
        export_hf(chunks, arch, companions=Companions.of(folder), target=exported_to, context=context)
        found = {name: tensor for file in exported_to.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return unlike(found, folder)


def save(folder: Path, saved: Path, context: ParallelContext) -> None:
    """A distributed checkpoint of the folder's weights."""
    arch = read_architecture(folder)
    chunks = build_model(arch, context, BuildOptions())
    load_hf(chunks, arch, folder, context)
    saved.mkdir(exist_ok=True)
    context.barrier()
    dist_checkpointing.save(chunks[0].sharded_state_dict(), str(saved))


def from_checkpoint(folder: Path, saved: Path, context: ParallelContext) -> list[str]:
    """What a distributed checkpoint, written under another layout, gives back changed."""
    arch = read_architecture(folder)
    chunks = build_model(arch, context, BuildOptions())
    for parameter in chunks[0].parameters():
        parameter.data.fill_(torch.nan)
    chunks[0].load_state_dict(dist_checkpointing.load(chunks[0].sharded_state_dict(), str(saved)))
    return unlike(merged({name: tensor.clone() for name, tensor in stage_weights(chunks, arch, context)}, context), folder)


def run_case(
    root: Path, expected: dict[str, Any], context: ParallelContext, steps: dict[str, Path | None], recompute: str
) -> dict[str, Any]:
    """``steps`` say where to export to, where to save a checkpoint, and which one to load."""
    arch = read_architecture(root / "fp32")
    chunks = build_model(arch, context, BuildOptions(recompute=recompute))
    load_hf(chunks, arch, root / "fp32", context)
    whole = RankModel(
        arch=arch, chunks=chunks, head=token_head(context, arch), context=context, companions=Companions.of(root / "fp32")
    )
    rows = score_sequences(whole, sequences(), PACK_TOKENS)
    worst = max(
        (float((torch.tensor(row) - want).abs().max()), index)
        for index, (row, want) in enumerate(zip(rows, expected["logprobs"], strict=True))
        if len(want)
    )
    model = Trainable(chunks, OptimizerConfig(distributed=False), context, 1)
    found = gradients(model, arch, sequences(), context)
    if steps["save"] is not None:
        save(root / "fp32", steps["save"], context)
    return {
        "logprobs": worst,
        "gradients": compare(found, expected["grads"]),
        "fp32": in_and_out(root / "fp32", "fp32", context, None),
        "bf16": in_and_out(root / "bf16", "bf16", context, steps["export"]),
        "checkpoint": from_checkpoint(root / "fp32", steps["load"], context) if steps["load"] is not None else [],
    }


def program(arguments: dict[str, Any], world_size: int) -> None:
    root = Path(arguments["root"])
    reference = torch.load(root / "reference.pt", weights_only=True)
    results: dict[str, Any] = {}
    for layout_name, layout in arguments["layouts"].items():
        layout = dict(layout)
        recompute = layout.pop("recompute", "none")
        with context_of(layout, world_size) as context:
            for case, how in arguments["cases"].items():
                folder = folder_of(root, case, "fp32").parent
                steps = {step: folder / step if layout_name in layouts else None for step, layouts in how.items()}
                if steps["load"] is not None:
                    steps["load"] = folder / "save"
                results.setdefault(layout_name, {})[case] = run_case(folder, reference[case], context, steps, recompute)
            if context.rank == 0:
                Path(arguments["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main(program)
