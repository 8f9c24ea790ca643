"""Co-located runs: what of trainer and engine is on a GPU in each phase, and how much memory that takes. No torch.

The estimate adds up the two sides of a GPU on which the fullest trainer rank and an engine sit, phase by phase as the two
take turns (docs/sglang.md). It is of GPUs whatever ``cluster.device`` auto finds here; there is none for CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlx.arch.sizes import Sizes
from rlx.config.memory import GIB, RESERVE_BYTES, Estimate
from rlx.config.schema import ClusterConfig, Config, RolloutConfig

# Of a GPU that is free when the server starts, the part that its weights and key-value cache take.
MEM_FRACTION_STATIC = 0.6
# What libraries and CUDA graphs of an engine keep when it gives everything back (measured: 1.7), and those of a resting trainer.
ENGINE_RESERVE_BYTES = 2 * GIB
RESTING_BYTES = 2 * GIB
# What the allocator of a resting trainer holds of a GPU, of what is in use (measured: 75.5 of 67.4, 8.6 of 7.5 GiB).
HELD_SHARE = 1.12
# The one that travels, laid flat; its tensors; the next one's, being gathered.
NUM_CHUNKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPhase:
    """Bytes of both sides in one phase, and what they are in words."""

    name: str
    engine: int
    engine_has: str
    trainer: int
    trainer_has: str

    @property
    def total(self) -> int:
        return self.engine + self.trainer


def offload_level(config: Config, device: str) -> str:
    """``cluster.offload`` resolved for trainers on ``device`` (cuda or cpu): none, optimizer (with the gradients) or all."""
    if not config.cluster.colocated:
        return "none"
    setting = config.cluster.offload
    return setting if setting != "auto" else "optimizer" if device == "cuda" else "none"


def release_level(cluster: ClusterConfig, rollout: RolloutConfig, device: str) -> str:
    """``rollout.release`` resolved for engines on ``device`` (cuda or cpu): none, kv_cache or all."""
    if not cluster.colocated:
        return "none"
    setting = rollout.release
    return setting if setting != "auto" else "all" if device == "cuda" else "none"


def mem_fraction_static(config: Config) -> float | None:
    """What a co-located server is started with; None for an engine that reserves nothing for keys and values."""
    if config.rollout.engine != "sglang":
        return None
    given = {name.replace("-", "_"): value for name, value in config.rollout.server_args.items()}.get("mem_fraction_static")
    return float(given) if isinstance(given, int | float) else MEM_FRACTION_STATIC


def shared_phases(config: Config, found: Estimate, sizes: Sizes) -> tuple[SharedPhase, ...]:
    """Rollout, training, publication; empty when trainers and engines share no GPUs. ``found`` is the estimate of each alone."""
    if not (config.cluster.colocated and config.starts_engines and config.cluster.device != "cpu"):
        return ()
    offload, release = offload_level(config, "cuda"), release_level(config.cluster, config.rollout, "cuda")
    num_trained = 2 if config.trains_critic else 1
    weights = found.weights * (num_trained + config.has_reference)
    optimizer = (found.gradients + found.optimizer) * num_trained
    kept = "" if offload != "none" else ", gradients, optimizer"
    left = {"none": weights + optimizer, "optimizer": weights, "all": 0}[offload]
    reserve = ENGINE_RESERVE_BYTES
    loaded, caches = found.engine_weights, _cache_bytes(config, found)
    stays = {"none": loaded + caches, "kv_cache": loaded, "all": 0}[release]
    both = "weights; caches not counted" if mem_fraction_static(config) is None else "weights and key-value cache"
    words = {"none": both, "kv_cache": "weights", "all": "libraries"}
    held = caches if release == "none" else 0
    largest = config.model.precision.weight_bytes * sizes.embedding
    travels = NUM_CHUNKS * max(config.sync.bucket_bytes, largest)
    chunks = f"{NUM_CHUNKS} chunks of {travels / NUM_CHUNKS / GIB:.1f}"
    if config.transport == "ipc":
        area = max(2 * config.sync.bucket_bytes, largest)
        travels = area + largest
        chunks = f"an area of {area / GIB:.1f}, a tensor of {largest / GIB:.1f}"
    return (
        SharedPhase(
            name="rollout",
            engine=reserve + loaded + caches,
            engine_has=both,
            trainer=RESTING_BYTES + int(HELD_SHARE * left),
            trainer_has="libraries" if offload == "all" else f"weights{kept}",
        ),
        SharedPhase(
            name="training",
            engine=reserve + stays,
            engine_has=words[release],
            trainer=found.trainer,
            trainer_has="everything",
        ),
        SharedPhase(
            name="publication",
            engine=reserve + loaded + held,
            engine_has=both if held else "weights",
            trainer=RESERVE_BYTES + weights + (0 if kept == "" else optimizer) + travels,
            trainer_has=f"weights{kept}, {chunks}",
        ),
    )


def _cache_bytes(config: Config, found: Estimate) -> int:
    fraction = mem_fraction_static(config)
    return 0 if fraction is None else max(0, int(fraction * config.cluster.gpu_memory_gib * GIB) - found.engine_weights)


def describe_phases(phases: tuple[SharedPhase, ...], config: Config) -> list[str]:
    """The estimate in words."""
    limit = config.cluster.gpu_memory_gib
    lines = [f"memory of a GPU that a trainer rank and an engine share, of {limit:g} GiB:"] if phases else []
    for phase in phases:
        engine, trainer = f"engine {phase.engine / GIB:.1f} ({phase.engine_has})", f"trainer {phase.trainer / GIB:.1f}"
        over = "; too much" if phase.total > limit * GIB else ""
        lines.append(f"  {phase.name}: about {phase.total / GIB:.1f} = {engine} + {trainer} ({phase.trainer_has}){over}")
    return lines


def sharing_problems(phases: tuple[SharedPhase, ...], found: Estimate, config: Config) -> list[str]:
    """What does not fit into ``cluster.gpu_memory_gib`` with both sides on it, and what would help."""
    if not phases:
        return []
    limit, problems = config.cluster.gpu_memory_gib, []
    fraction = mem_fraction_static(config)
    if fraction is not None and found.engine_weights >= fraction * limit * GIB:
        problems.append(
            f"rollout.server_args.mem_fraction_static: {fraction:g} of {limit:g} GiB leaves no room for keys and values beside"
            f" {found.engine_weights / GIB:.0f} GiB of weights; raise it or rollout.tp"
        )
    fullest = max(phases, key=lambda phase: phase.total)
    if fullest.total > limit * GIB:
        problems.append(
            f"cluster.gpu_memory_gib: on a shared GPU {fullest.name} takes about {fullest.total / GIB:.0f} GiB of {limit:g}, the"
            f" engine {fullest.engine / GIB:.0f} and the trainer {fullest.trainer / GIB:.0f}; {_remedies(fullest.name, config)}"
        )
    return problems


def _remedies(name: str, config: Config) -> str:
    """What makes this phase smaller."""
    offload, release = offload_level(config, "cuda"), release_level(config.cluster, config.rollout, "cuda")
    found = []
    if name != "training" and offload == "none":
        found.append("set cluster.offload=optimizer" + (" or all" if name == "rollout" else ""))
    if name == "rollout" and offload == "optimizer":
        found.append("set cluster.offload=all")
    if name == "training" and release != "all":
        found.append("set rollout.release=all")
    if name == "publication" and release == "none":
        found.append("set rollout.release=kv_cache or all")
    if mem_fraction_static(config) is not None and (name == "rollout" or release == "none"):
        found.append("lower rollout.server_args.mem_fraction_static")
    if name == "publication":
        found.append("lower sync.bucket_bytes")
    if name == "training":
        found.append("lower batching.max_tokens_per_micro_batch")
        found += [] if config.model.recompute == "full" else ["set model.recompute=full"]
    found.append("raise rollout.tp" if name == "rollout" else "raise parallel.tp, pp or ep")
    return ", ".join(found[:-1]) + f" or {found[-1]}" if len(found) > 1 else found[0]
