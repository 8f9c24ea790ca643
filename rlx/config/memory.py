"""How much memory a trainer rank and an engine need, from a model's sizes and the layout alone. Pure arithmetic, no torch.

Counted: weights, gradients and optimizer state of the fullest pipeline stage, the reference's and critic's share, the
activations of the micro-batches in flight and the logits of one; a vision tower, whole on that stage, and its patches. Not
counted: fragmentation and what libraries keep, for which ``RESERVE_BYTES`` stands. An estimate: meant to tell a layout that
fits from one that does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlx.arch.engine_format import engine_format
from rlx.arch.sizes import Sizes
from rlx.arch.vision import Vision
from rlx.config.schema import Config
from rlx.types.precision import GRADIENT_BYTES

GIB = 2**30
RESERVE_BYTES = 4 * GIB
# Of an engine's GPU, the part that weights may take; the rest holds keys and values.
ENGINE_WEIGHT_SHARE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes on the GPU of the fullest trainer rank, by what they are, and an engine GPU's share of the weights."""

    weights: int
    gradients: int
    optimizer: int
    other_models: int
    activations: int
    patches: int
    logits: int
    engine_weights: int

    @property
    def trainer(self) -> int:
        parts = (self.weights, self.gradients, self.optimizer, self.other_models, self.activations, self.patches, self.logits)
        return sum(parts) + RESERVE_BYTES


def estimate(config: Config, sizes: Sizes) -> Estimate:
    """The estimate for one configuration whose layout is in order."""
    layout, ranks = config.parallel, config.num_trainer_ranks
    width = config.model.precision.weight_bytes
    etp = layout.tp if layout.etp is None else layout.etp
    dense, experts = _stage(config, sizes, etp)
    dense_copies = ranks // (layout.tp * layout.pp) if config.optimizer.distributed else 1
    expert_copies = ranks // (etp * layout.ep * layout.pp) if config.optimizer.distributed else 1
    trains = 0 if config.evaluation.only else 1
    learnt = dense + {"train": sizes.tower, "projector": sizes.projector, "frozen": 0}[config.model.vision]
    optimizer = trains * config.model.precision.optimizer_bytes * (learnt / dense_copies + experts / max(1, expert_copies))
    weights, gradients = width * (dense + experts + sizes.tower), trains * GRADIENT_BYTES * (learnt + experts)
    others = weights if config.has_reference else 0
    if config.trains_critic:
        others += weights + gradients + optimizer
    tokens = config.batching.max_tokens_per_micro_batch / layout.cp
    return Estimate(
        weights=int(weights),
        gradients=int(gradients),
        optimizer=int(optimizer),
        other_models=int(others),
        activations=int(_activations(config, sizes, tokens, width)),
        patches=int(_patches(config, sizes.arch.vision, width)),
        logits=0 if config.finetune.objective == "rm" else int(tokens * sizes.arch.vocab_size / layout.tp * (width + 2 * 4)),
        engine_weights=0 if config.is_finetuning else _engine_weights(config, sizes) // config.rollout.tp,
    )


def _engine_weights(config: Config, sizes: Sizes) -> int:
    width = config.engine_precision.weight_bytes
    return engine_format(sizes.arch, fp8=True).num_bytes(width) if config.rollout.fp8 else width * sizes.total


def _stage(config: Config, sizes: Sizes, etp: int) -> tuple[float, float]:
    """(dense, expert) parameters on a rank of the fullest stage: as many layers as any has, and the larger end."""
    layout = config.parallel
    layers = -(-sizes.arch.num_layers // layout.pp)
    moe_layers = min(layers, sizes.num_moe_layers)
    ends = sizes.embedding + sizes.output if layout.pp == 1 else max(sizes.embedding, sizes.output or sizes.embedding)
    dense = layers * sizes.attention + (layers - moe_layers) * sizes.dense_mlp + moe_layers * sizes.moe_mlp + ends
    return dense / layout.tp, moe_layers * sizes.experts / (layout.ep * etp)


def _activations(config: Config, sizes: Sizes, tokens: float, width: int) -> float:
    """What the backward pass needs; the first pipeline stage holds as many micro-batches as there are stages."""
    layout = config.parallel
    split = layout.tp if layout.sequence_parallel else 1
    layer = width * tokens * (10 * sizes.arch.hidden_size / split + (sizes.attention_width + sizes.mlp_width) / layout.tp)
    layers_in_flight = -(-sizes.arch.num_layers // layout.pp) * layout.pp
    if layout.vpp > 1:
        layers_in_flight = int(layers_in_flight * (1 + (layout.pp - 1) / (layout.pp * layout.vpp)))
    if config.model.recompute == "full":
        return layer + width * tokens * sizes.arch.hidden_size / split * layers_in_flight
    return layer * layers_in_flight


def _patches(config: Config, vision: Vision | None, width: int) -> float:
    """What the tower keeps of a micro-batch's patches: one block at work, and where it learns the input of every block, of as
    many micro-batches as there are stages. Without a limit of their own they are as many as the tokens allow."""
    if vision is None:
        return 0
    most = config.batching.max_patches_per_micro_batch
    allowed = config.batching.max_tokens_per_micro_batch * vision.merge**2
    at_work = 12 * vision.hidden_size + 3 * vision.mlp_size
    kept = vision.depth * vision.hidden_size * config.parallel.pp if config.model.vision == "train" else 0
    return width * (allowed if most is None else min(most, allowed)) * (at_work + kept)


def describe(found: Estimate, sizes: Sizes) -> list[str]:
    """The estimate in words."""
    parts = {
        "weights": found.weights,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        "other models": found.other_models,
        "activations": found.activations,
        "logits": found.logits,
    }
    parts |= {"patches": found.patches} if found.patches else {}
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    tower = f", {sizes.tower / 1e9:.2f} of them in the vision tower" if sizes.tower else ""
    lines = [
        f"model: {sizes.total / 1e9:.2f} billion parameters{tower}",
        f"memory of the fullest trainer rank, GiB: about {found.trainer / GIB:.1f} ({listed}, reserve {RESERVE_BYTES / GIB:.0f})",
    ]
    return [*lines, f"weights on each engine GPU, GiB: {found.engine_weights / GIB:.1f}"] if found.engine_weights else lines


def memory_problems(found: Estimate, config: Config) -> list[str]:
    """What does not fit into ``cluster.gpu_memory_gib``, and what would help."""
    limit = config.cluster.gpu_memory_gib * GIB
    problems = []
    patches = " or batching.max_patches_per_micro_batch" if found.patches else ""
    if found.trainer > limit:
        problems.append(
            f"cluster.gpu_memory_gib: a trainer rank needs about {found.trainer / GIB:.0f} GiB of"
            f" {config.cluster.gpu_memory_gib:g}; raise parallel.tp, pp or ep or cluster.num_trainer_ranks,"
            f" lower batching.max_tokens_per_micro_batch{patches}, or set model.recompute=full"
        )
    if config.starts_engines and found.engine_weights > ENGINE_WEIGHT_SHARE * limit:
        needed = -(-found.engine_weights * config.rollout.tp // int(ENGINE_WEIGHT_SHARE * limit))
        problems.append(
            f"rollout.tp: {found.engine_weights / GIB:.0f} GiB of weights on an engine GPU leave no room for keys and values;"
            f" use at least {needed}"
        )
    return problems
