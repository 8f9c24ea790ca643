"""How much memory a trainer rank and an engine need, from a model's sizes and the layout alone. Pure arithmetic, no torch.

Counted: weights, gradients and optimizer state of a pipeline stage, the reference's and critic's share, the activations of the
micro-batches in flight and the output layer's work on one; a vision tower, whole on the first stage, and its patches. Layers are
Transformer Engine's but where ``model.layer_spec`` or fp32 say that they are Megatron's local ones. Not counted: fragmentation
and what libraries keep, for which ``RESERVE_BYTES`` stands. ``tests/benchmarks/bench_memory.py`` measures it on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from rlx.arch.engine_format import engine_format
from rlx.arch.layout import layers_per_chunk
from rlx.arch.sizes import Sizes
from rlx.arch.vision import Vision
from rlx.config.schema import Config
from rlx.types.precision import GRADIENT_BYTES

GIB = 2**30
RESERVE_BYTES = 4 * GIB
# Of a weight that CPUs step on: its gradient, a master and two moments, each in fp32.
HOST_BYTES = 16
# How many a rank has at a time on a GPU (``rlx.parallel.vocab``).
LOGITS_AT_ONCE = 2**28
# Of an engine's GPU, the part that weights may take; the rest holds keys and values.
ENGINE_WEIGHT_SHARE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes on the GPU of the fullest trainer rank, by what they are, and an engine GPU's share of the weights. ``host`` is what
    optimizers with ``offload`` hold of that rank in host memory, the gradients that they step on included."""

    weights: int
    gradients: int
    optimizer: int
    other_models: int
    activations: int
    patches: int
    logits: int
    engine_weights: int
    host: int = 0

    @property
    def allocated(self) -> int:
        """What PyTorch's allocator has handed out at the fullest moment."""
        parts = (self.weights, self.gradients, self.optimizer, self.other_models, self.activations, self.patches, self.logits)
        return sum(parts)

    @property
    def trainer(self) -> int:
        return self.allocated + RESERVE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """A pipeline stage of one rank: parameters (``experts`` are the routed ones), ``layers``, and how many of them hold the
    activations of a micro-batch at once, each counted once a micro-batch."""

    layers: int
    dense: float
    experts: float
    layers_in_flight: float
    is_first: bool
    is_last: bool


def estimate(config: Config, sizes: Sizes) -> Estimate:
    """The estimate for one configuration whose layout is in order: of the pipeline stage that takes most."""
    return max((_of_stage(config, sizes, stage) for stage in _stages(config, sizes)), key=lambda found: found.allocated)


def _of_stage(config: Config, sizes: Sizes, stage: _Stage) -> Estimate:
    layout, ranks = config.parallel, config.num_trainer_ranks
    width = config.model.precision.weight_bytes
    dense_copies = ranks // (layout.tp * layout.pp) if config.optimizer.distributed else 1
    expert_copies = ranks // (_etp(config) * layout.ep * layout.pp) if config.optimizer.distributed else 1
    trains = 0 if config.evaluation.only else 1
    tower = sizes.tower if stage.is_first else 0
    learns = {"train": sizes.tower, "projector": sizes.projector, "frozen": 0}[config.model.vision] if stage.is_first else 0
    learnt = stage.dense + learns
    stepped = trains * (learnt / dense_copies + stage.experts / max(1, expert_copies))
    state = config.model.precision.optimizer_bytes * stepped
    on_gpu = [0 if one.offload else state for one in (config.optimizer, config.critic_optimizer)]
    weights, gradients = width * (stage.dense + stage.experts + tower), trains * GRADIENT_BYTES * (learnt + stage.experts)
    others = weights if config.has_reference else 0
    if config.trains_critic:
        others += weights + gradients + on_gpu[1]
    num_on_host = config.optimizer.offload + (config.trains_critic and config.critic_optimizer.offload)
    tokens = config.batching.max_tokens_per_micro_batch / layout.cp
    kept, at_work = _activations(config, sizes, tokens, stage)
    logits = _logits(config, sizes, tokens) if stage.is_last else 0
    return Estimate(
        weights=int(weights),
        gradients=int(gradients),
        optimizer=int(on_gpu[0]),
        other_models=int(others),
        # The logits are gone when the first layer is computed again.
        activations=int(kept + max(0, at_work - logits)),
        patches=int(_patches(config, sizes.arch.vision, width)) if stage.is_first else 0,
        logits=int(logits),
        engine_weights=0 if config.is_finetuning else _engine_weights(config, sizes) // config.rollout.tp,
        host=int(num_on_host * HOST_BYTES * stepped),
    )


def _engine_weights(config: Config, sizes: Sizes) -> int:
    width = config.engine_precision.weight_bytes
    return engine_format(sizes.arch, fp8=True).num_bytes(width) if config.rollout.fp8 else width * sizes.total


def _etp(config: Config) -> int:
    return config.parallel.tp if config.parallel.etp is None else config.parallel.etp


def _stages(config: Config, sizes: Sizes) -> Iterator[_Stage]:
    """The first stages of a pipeline wait for the last ones: they hold more micro-batches at once."""
    layout, arch = config.parallel, sizes.arch
    chunks = layers_per_chunk(arch.num_layers, layout.pp, layout.vpp)
    borders = [0, *accumulate(chunks)]
    for stage in range(layout.pp):
        numbers = [layer for chunk in range(stage, len(chunks), layout.pp) for layer in range(borders[chunk], borders[chunk + 1])]
        sparse = sum(map(arch.has_experts, numbers))
        is_first, is_last = stage == 0, stage == layout.pp - 1
        output = sizes.output or (0 if is_first else sizes.embedding)  # a tied one has a copy on a stage of its own
        dense = len(numbers) * sizes.attention + (len(numbers) - sparse) * sizes.dense_mlp + sparse * sizes.moe_mlp
        dense += is_first * sizes.embedding + is_last * output
        after = layout.pp - 1 - stage
        in_flight = after + 1 if layout.vpp == 1 else (2 * after + (layout.vpp - 1) * layout.pp + 1) / layout.vpp
        yield _Stage(
            layers=len(numbers),
            dense=dense / layout.tp,
            experts=sparse * sizes.experts / (layout.ep * _etp(config)),
            layers_in_flight=len(numbers) * in_flight,
            is_first=is_first,
            is_last=is_last,
        )


def _activations(config: Config, sizes: Sizes, tokens: float, stage: _Stage) -> tuple[float, float]:
    """What layers keep for the backward pass, and what the one at work has besides: in an evaluation, and while the backward pass
    of a recomputed one runs."""
    layout, model, arch, width = config.parallel, config.model, sizes.arch, config.model.precision.weight_bytes
    split = layout.tp if layout.sequence_parallel else 1
    # The local layers keep norms in fp32 and keys and values repeated for every head.
    is_local = model.layer_spec == "torch" or model.precision.name == "fp32"
    hidden = (9 if is_local else 4) * arch.hidden_size / split
    repeated = 2 * arch.head_dim * (arch.num_heads - arch.num_kv_heads) if is_local else 0
    mlp = sizes.mlp_width(one_kernel=not is_local) / layout.tp
    layer = hidden + (sizes.attention_width + repeated) / layout.tp + mlp
    again = 0.0
    if config.evaluation.only:
        again, layer = layer, 0.0
    elif model.recompute == "full":
        chosen = stage.layers if model.recompute_layers is None else min(stage.layers, model.recompute_layers)
        again, share = layer, chosen / stage.layers
        layer = share * arch.hidden_size / split + (1 - share) * layer
    elif model.recompute == "selective" and arch.experts is None:
        again, layer = mlp, layer - mlp
    return width * tokens * layer * stage.layers_in_flight, width * tokens * again


def _logits(config: Config, sizes: Sizes, tokens: float) -> float:
    """The output layer's backward pass: a chunk of logits and of their gradient, the weight's gradient in fp32 and a part of it,
    and under sequence parallelism the hidden states of all tokens and their gradient."""
    if config.finetune.objective == "rm":
        return 0
    model, layout, width = config.model, config.parallel, config.model.precision.weight_bytes
    rows = sizes.arch.vocab_size / layout.tp
    product = 4 if model.fp32_head else width
    chunk = min(tokens * rows, LOGITS_AT_ONCE) * (product + width)
    gathered = 2 * width * tokens * sizes.arch.hidden_size if layout.sequence_parallel else 0
    return chunk + (4 + width) * rows * sizes.arch.hidden_size + gathered


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
    if found.host:
        lines.append(
            f"host memory of that rank, GiB: {found.host / GIB:.1f} (optimizer state and the gradients that it steps on)"
        )
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
            f" lower batching.max_tokens_per_micro_batch{patches}, or set model.recompute=full or optimizer.offload=true"
        )
    if config.starts_engines and found.engine_weights > ENGINE_WEIGHT_SHARE * limit:
        needed = -(-found.engine_weights * config.rollout.tp // int(ENGINE_WEIGHT_SHARE * limit))
        problems.append(
            f"rollout.tp: {found.engine_weights / GIB:.0f} GiB of weights on an engine GPU leave no room for keys and values;"
            f" use at least {needed}"
        )
    return problems
