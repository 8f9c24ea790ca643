"""Vision-language families under several layouts: log-probs and gradients, the tower's too, against transformers; weights in
and out."""

from __future__ import annotations

import json
from dataclasses import replace
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
from rlx.parallel.checkpoint import load_trainable, save_trainable
from rlx.parallel.context import ParallelContext
from rlx.parallel.optimizer import Trainable
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import Divisors, forward_backward
from rlx.trainer.batch import RankBatch
from rlx.trainer.rank_model import RankModel
from rlx.trainer.scoring import score_sequences
from rlx.types.batch import LossOutput
from rlx.types.rollout import ImageSpan
from rlx.types.train_batch import BatchPart, TrainSample
from tests.batches import batch_of, train_sample
from tests.dist.programs.families import compare, in_and_out, merged
from tests.dist.programs.layouts import context_of, main, plan_of
from tests.dist.vision_folders import folder_of, grid_of, sequences

LEARNING_RATE, TOWER_SCALE = 1e-3, 0.25
PLAIN = OptimizerConfig(distributed=False, lr=LEARNING_RATE)
NUM_STEPS = 4
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


def model_of(
    root: Path, folder: Path, context: ParallelContext, learns: str, recompute: str = "none", optimizer: OptimizerConfig = PLAIN
) -> RankModel:
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
        trainable=Trainable(chunks, optimizer, context, NUM_STEPS),
    )


def learnt(root: Path, folder: Path, context: ParallelContext, part: BatchPart, expected: dict[str, Tensor]) -> dict[str, Any]:
    """What has a gradient with a tower that is frozen, or learns in its projector; the rest as before."""
    found: dict[str, Any] = {}
    for learns, begins in (("frozen", ()), ("projector", ("visual.merger.",))):
        model = model_of(root, folder, context, learns)
        seen: list[Tensor] = []
        model.chunks[0].vision.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))  # type: ignore[union-attr]
        wanted = {
            name: grad for name, grad in expected.items() if not name.startswith("visual.") or name.startswith(begins or "-")
        }
        fresh = RankBatch(part, context)
        passes = [model.score(fresh.all_packs()), model.score(fresh.all_packs())]
        found[learns] = compare(gradients(model, fresh), wanted)
        same = all(torch.equal(a, b) for (_, a), (_, b) in zip(*passes, strict=True))
        found[f"{learns} constant"] = sorted(model.constant_weights()) == sorted(set(dict(model.weights())) - wanted.keys())
        found[f"{learns} patches"] = [sum(len(patches) for patches in seen), same]
    return found


def weights(model: RankModel) -> dict[str, Tensor]:
    return merged({name: tensor.clone() for name, tensor in model.weights()}, model.context)


def scaled(root: Path, folder: Path, context: ParallelContext, batch: RankBatch) -> dict[str, Any]:
    """What ``vision_lr_scale`` does. By what learns and who holds the optimizer: how far a step of what it is for is from a
    scaled step, and of all else from the same step, in learning rates; and how far what it is for went."""
    found = {}
    for learns, begins in (("train", "visual."), ("projector", "visual.merger.")):
        for distributed in (False, True):
            moved = []
            for scale in (1.0, TOWER_SCALE):
                optimizer = replace(PLAIN, distributed=distributed, vision_lr_scale=scale)
                model = model_of(root, folder, context, learns, optimizer=optimizer)
                before = weights(model)
                gradients(model, batch)
                assert model.trainable is not None and model.trainable.step().learning_rate == LEARNING_RATE
                moved.append({name: tensor - before[name] for name, tensor in weights(model).items()})
            usual, changed = moved
            factors = {name: TOWER_SCALE if name.startswith(begins) else 1.0 for name in usual}
            apart = max(float((changed[name] - factors[name] * usual[name]).abs().max()) for name in usual)
            went = max(float(changed[name].abs().max()) for name in usual if name.startswith(begins))
            found[f"{learns} {'distributed' if distributed else 'plain'}"] = [apart / LEARNING_RATE, went / LEARNING_RATE]
    return found


def scheduled(root: Path, folder: Path, context: ParallelContext) -> list[list[float]]:
    """The learning rates of all groups of parameters, step by step down to ``min_lr``."""
    schedule = replace(PLAIN, vision_lr_scale=TOWER_SCALE, warmup_steps=1, schedule="linear", min_lr=LEARNING_RATE / 4)
    trainable = model_of(root, folder, context, "train", optimizer=schedule).trainable
    assert trainable is not None
    rates = []
    for _ in range(NUM_STEPS + 1):
        rates.append(sorted({group["lr"] / LEARNING_RATE for group in trainable.optimizer.param_groups}))
        trainable.schedule.step(1)
    return rates


def train_and_save(model: RankModel, batch: RankBatch, folder: Path) -> None:
    """A step, a checkpoint, another step; the weights after each beside the checkpoint."""
    steps = []
    for number in range(2):
        gradients(model, batch)
        assert model.trainable is not None
        model.trainable.step()
        steps.append(weights(model))
        if number == 0:
            folder.mkdir(exist_ok=True)
            model.context.barrier()
            save_trainable(model.trainable, folder)
    torch.save(steps, folder.with_suffix(".pt"))


def load_and_train(model: RankModel, batch: RankBatch, folder: Path) -> tuple[bool, float]:
    """Whether the checkpoint's weights came back to the bit, and how far the next step leads elsewhere, in learning rates."""
    first, second = torch.load(folder.with_suffix(".pt"), weights_only=True)
    assert model.trainable is not None
    load_trainable(model.trainable, folder)
    found = weights(model)
    same = found.keys() == first.keys() and all(torch.equal(found[name], first[name]) for name in first)
    gradients(model, batch)
    model.trainable.step()
    found = weights(model)
    return same, max(float((found[name] - second[name]).abs().mean()) for name in second) / LEARNING_RATE


def run_case(root: Path, case: str, expected: dict[str, Any], context: ParallelContext, how: dict[str, Any]) -> dict[str, Any]:
    """``how``: the steps beside the comparison that this layout takes, and its recomputation."""
    folder = folder_of(root, case, "fp32")
    whole = batch_of(samples(json.loads((root / "keys.json").read_text())))
    plan = plan_of(list(whole), PACK_TOKENS, context)
    part = part_of(whole, plan, context.dp_rank)
    batch = RankBatch(part, context)
    model = model_of(root, folder, context, "train", how["recompute"])
    rows = score_sequences(model, [s.token_ids.tolist() for s in whole], PACK_TOKENS, [s.images for s in whole])
    worst = max(
        (float((torch.tensor(row) - want).abs().max()), index)
        for index, (row, want) in enumerate(zip(rows, expected["logprobs"], strict=True))
    )
    found: dict[str, Any] = {
        "logprobs": worst,
        "gradients": compare(gradients(model, batch), expected["grads"]),
        "replicas": max(context.gather_objects((replicas_differ(model), context.rank))),
        "fp32": in_and_out(folder, "fp32", context, None),
        "bf16": in_and_out(folder_of(root, case, "bf16"), "bf16", context, folder.parent / "export" if how["exports"] else None),
    }
    for learns, scale in (("train", TOWER_SCALE), ("projector", 1.0)):
        saved, optimizer = folder.parent / learns, replace(PLAIN, vision_lr_scale=scale)
        if how["saves"]:
            train_and_save(model_of(root, folder, context, learns, optimizer=optimizer), batch, saved)
        if how["loads"]:
            model = model_of(root, folder, context, learns, optimizer=replace(optimizer, distributed=True))
            found[f"{learns} checkpoint"] = load_and_train(model, batch, saved)
    if how["scales"]:
        found |= {"scaled": scaled(root, folder, context, batch), "rates": scheduled(root, folder, context)}
    if how["learns"]:
        found |= learnt(root, folder, context, part, expected["grads"])
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
                how["scales"] = case == arguments["cases"][name][0]
                results.setdefault(name, {})[case] = run_case(root, case, reference[case], context, how)
            if context.rank == 0:
                Path(arguments["out"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main(program)
