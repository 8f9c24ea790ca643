"""How a model is cut by a layout, and whether it can be. Every entrance asks before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from rlx.arch.architecture import Architecture
from rlx.types.layout import ParallelDims


def layers_per_chunk(num_layers: int, pp: int, vpp: int = 1) -> list[int]:
    """Layers of each model chunk, in the order of the layers (chunk i sits on stage i modulo ``pp``).

    Chunks differ by at most one layer. The odd layers go to the middle first and to the last chunk never: the first
    chunk has the embedding to do besides, the last one the log-probs.
    """
    chunks = pp * vpp
    if num_layers < chunks:
        raise ValueError(f"{num_layers} layers do not fill parallel.pp x parallel.vpp = {pp} x {vpp} = {chunks} chunks")
    share, rest = divmod(num_layers, chunks)
    longer = {*range(1, chunks - 1)[:rest]}
    if len(longer) < rest:
        longer.add(0)
    return [share + (chunk in longer) for chunk in range(chunks)]


def layout_problems(arch: Architecture, dims: ParallelDims) -> Iterator[tuple[str, str]]:
    """What does not fit, as (dimension, what is wrong with it): ``tp``, ``pp``, ``ep``, ``etp`` or ``sequence_parallel``."""
    yield from _tensor(arch, dims.tp)
    if arch.num_layers < dims.pp * dims.vpp:
        cut = ("pp", f"{dims.pp} stages leave") if dims.vpp == 1 else ("vpp", f"{dims.vpp} x pp {dims.pp} chunks leave")
        yield cut[0], f"{cut[1]} some without any of the model's {arch.num_layers} layers"
    if dims.tp > 1 and not dims.sequence_parallel and (arch.experts is not None or arch.latent is not None):
        kind = "a mixture of experts (Megatron's dispatcher)" if arch.experts is not None else "latent attention"
        yield "sequence_parallel", f"must be true with tp > 1 for {kind}"
    if arch.experts is None:
        if dims.ep > 1:
            yield "ep", f"{dims.ep} needs a mixture-of-experts model, but this one is dense; set it to 1"
        return
    if arch.experts.num_experts % dims.ep:
        yield "ep", f"{dims.ep} does not divide the model's {arch.experts.num_experts} experts"
    if arch.experts.hidden_size % dims.expert_tp:
        size = arch.experts.hidden_size
        yield "etp", f"{dims.expert_tp} (tp unless set) does not divide the {size} hidden units of the model's experts"


def _tensor(arch: Architecture, tp: int) -> Iterator[tuple[str, str]]:
    """With fewer key-value heads than ranks, Megatron cuts the fused projection's rows evenly and lets several ranks share a
    head; with more, every rank gets whole heads."""
    if arch.num_heads % tp:
        yield "tp", f"{tp} does not divide the model's {arch.num_heads} attention heads"
    elif arch.num_kv_heads % tp and tp % arch.num_kv_heads:
        yield "tp", f"{tp} must divide, or be a multiple of, the model's {arch.num_kv_heads} key-value heads"
    elif arch.latent is None and (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim % tp:
        rows = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
        yield "tp", f"{tp} does not divide the {rows} rows of the model's fused query-key-value projection"
    experts = arch.experts
    if (experts is None or not all(experts.layers)) and arch.ffn_hidden_size % tp:
        yield "tp", f"{tp} does not divide the {arch.ffn_hidden_size} hidden units of the model's MLP"
    if experts is not None and experts.shared_hidden_size % tp:
        yield "tp", f"{tp} does not divide the {experts.shared_hidden_size} hidden units of the model's shared expert"
