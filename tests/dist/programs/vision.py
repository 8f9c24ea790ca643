"""Vision-language families under several layouts: log-probs and gradients, the tower's too, against transformers; weights in
and out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlx.arch.families.registry import read_architecture
from rlx.config.schema import OptimizerConfig
from rlx.data.images.pixels import image_file
from rlx.data.plan import part_of
from rlx.models.build import BuildOptions, build_model
from rlx.models.heads import token_head
from rlx.models.hf.companions import Companions
from rlx.models.hf.io import load_hf, stage_weights
from rlx.parallel.context import ParallelContext
from rlx.parallel.optimizer import Trainable
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import Divisors, forward_backward
from rlx.trainer.batch import RankBatch
from rlx.trainer.rank_model import RankModel
from rlx.trainer.scoring import score_sequences
from rlx.types.batch import LossOutput
from rlx.types.rollout import ImageSpan
from rlx.types.train_batch import TrainSample
from tests.batches import batch_of, train_sample
from tests.dist.programs.families import compare, from_checkpoint, in_and_out, merged, save
from tests.dist.programs.layouts import context_of, main, plan_of
from tests.dist.vision_folders import folder_of, grid_of, sequences

PACK_TOKENS = 160  # several sequences a pack, several packs


def samples(keys: dict[str, str]) -> list[TrainSample]:
    found = []
    for index, sequence in enumerate(sequences()):
        ids = sequence.token_ids
        images = tuple(ImageSpan(key=keys[name], start=start, grid=grid_of(name)) for name, start in sequence.images)
        mask = [position >= sequence.asked for position in range(len(ids))]
        found.append(train_sample(sample_id=index, group_id=index, token_ids=ids, loss_mask=mask, images=images))
    return found


def gradients(model: RankModel, batch: RankBatch) -> dict[str, Tensor]:
    """Gradients of the mean next-token loss, whole, under Hugging Face names, on every rank; none of what is frozen."""

    def loss(outputs: Tensor, local: LocalBatch) -> LossOutput:
        return LossOutput(loss=-(outputs[0] * local.loss_mask_t).sum(), stats={})

    assert model.trainable is not None
    trainable, context = model.trainable, model.context
    trainable.zero_grad()
    total = batch.counts(0).num_loss_tokens
    divisors = Divisors(loss=total, loss_tokens=total)
    forward_backward(trainable.wrapped, batch.packs(0), model.head, loss, divisors=divisors, context=context)
    frozen = torch.tensor(torch.nan)

    def read(parameter: torch.nn.Parameter) -> Tensor:
        if parameter.requires_grad:
            gradient: Tensor = parameter.main_grad.detach()  # type: ignore[attr-defined]
            return gradient
        assert not hasattr(parameter, "main_grad") and parameter.grad is None
        return frozen.expand(parameter.shape)

    whole = {name: gradient.clone() for name, gradient in stage_weights(trainable.chunks, model.arch, context, read)}
    return {name: gradient for name, gradient in merged(whole, context).items() if not gradient.isnan().all()}


def replicas_differ(model: RankModel) -> float:
    """How far the tower's gradients are apart over tensor-parallel ranks."""
    towers = [chunk.vision for chunk in model.chunks if hasattr(chunk, "vision")]
    if not towers:
        return 0.0
    flat = torch.cat([parameter.main_grad.flatten() for parameter in towers[0].parameters()])  # type: ignore[union-attr]
    others = [torch.empty_like(flat) for _ in range(model.context.dims.tp)]
    torch.distributed.all_gather(others, flat, group=model.context.groups.tp)
    return max(float((other - flat).abs().max()) for other in others)


def model_of(root: Path, folder: Path, context: ParallelContext, learns: str, recompute: str) -> RankModel:
    arch = read_architecture(folder)
    options = BuildOptions(vision=learns, images=partial(image_file, root / "images"), recompute=recompute)
    chunks = build_model(arch, context, options)
    load_hf(chunks, arch, folder, context)
    return RankModel(
        arch=arch,
        chunks=chunks,
        head=token_head(context, arch),
        context=context,
        companions=Companions.of(folder),
        trainable=Trainable(chunks, OptimizerConfig(distributed=False), context, 1),
    )


def learnt(root: Path, folder: Path, context: ParallelContext, batch: RankBatch, expected: dict[str, Tensor]) -> dict[str, Any]:
    """What has a gradient with a tower that is frozen, or learns in its projector; the rest as before."""
    found = {}
    for learns, begins in (("frozen", ()), ("projector", ("visual.merger.",))):
        model = model_of(root, folder, context, learns, "none")
        wanted = {
            name: grad for name, grad in expected.items() if not name.startswith("visual.") or name.startswith(begins or "-")
        }
        found[learns] = compare(gradients(model, batch), wanted)
    return found


def run_case(root: Path, case: str, expected: dict[str, Any], context: ParallelContext, how: dict[str, Any]) -> dict[str, Any]:
    """``how``: the steps beside the comparison that this layout takes, and its recomputation."""
    folder = folder_of(root, case, "fp32")
    whole = batch_of(samples(json.loads((root / "keys.json").read_text())))
    plan = plan_of(list(whole), PACK_TOKENS, context)
    batch = RankBatch(part_of(whole, plan, context.dp_rank), context)
    model = model_of(root, folder, context, "train", how["recompute"])
    rows = score_sequences(model, [s.token_ids.tolist() for s in whole], PACK_TOKENS, [s.images for s in whole])
    worst = max(
        (float((torch.tensor(row) - want).abs().max()), index)
        for index, (row, want) in enumerate(zip(rows, expected["logprobs"], strict=True))
    )
    found = {
        "logprobs": worst,
        "gradients": compare(gradients(model, batch), expected["grads"]),
        "replicas": max(context.gather_objects((replicas_differ(model), context.rank))),
        "fp32": in_and_out(folder, "fp32", context, None),
        "bf16": in_and_out(folder_of(root, case, "bf16"), "bf16", context, folder.parent / "export" if how["exports"] else None),
    }
    if how["saves"]:
        save(folder, folder.parent / "save", context)
    if how["loads"]:
        found["checkpoint"] = from_checkpoint(folder, folder.parent / "save", context)
    if how["learns"]:
        found |= learnt(root, folder, context, batch, expected["grads"])
    return found


def program(arguments: dict[str, Any], world_size: int) -> None:
    root = Path(arguments["root"])
    reference = torch.load(root / "reference.pt", weights_only=True)
    results: dict[str, Any] = {}
    for name, layout in arguments["layouts"].items():
        how = {"recompute": layout.pop("recompute", "none")}
        how |= {step: name == arguments[step] for step in ("exports", "saves", "loads", "learns")}
        with context_of(layout, world_size) as context:
            for case in arguments["cases"][name]:
                results.setdefault(name, {})[case] = run_case(root, case, reference[case], context, how)
            if context.rank == 0:
                Path(arguments["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main(program)
