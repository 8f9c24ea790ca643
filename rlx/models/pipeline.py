"""How layers are dealt to pipeline stages, and how Megatron is told."""

from __future__ import annotations


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


def megatron_layout(num_layers: int, pp: int, vpp: int) -> list[list[str]] | None:
    """Megatron's ``pipeline_model_parallel_layout``; None where the layers divide evenly and its own split is the same."""
    if num_layers % (pp * vpp) == 0:
        return None
    layout = [["decoder"] * layers for layers in layers_per_chunk(num_layers, pp, vpp)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
