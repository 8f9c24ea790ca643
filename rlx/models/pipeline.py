"""How layers are dealt to pipeline stages, and how Megatron is told."""

from __future__ import annotations

from rlx.arch.layout import layers_per_chunk


def megatron_layout(num_layers: int, pp: int, vpp: int) -> list[list[str]] | None:
    """Megatron's ``pipeline_model_parallel_layout``; None where the layers divide evenly and its own split is the same."""
    if num_layers % (pp * vpp) == 0:
        return None
    layout = [["decoder"] * layers for layers in layers_per_chunk(num_layers, pp, vpp)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
