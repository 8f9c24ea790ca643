"""Bf16 models: what the token head gives, and the hidden states that the output layer saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from rlx.arch.families.registry import read_architecture
from rlx.models.build import BuildOptions, build_model
from rlx.models.heads import token_head
from rlx.models.hf.io import load_hf
from rlx.parallel.context import ParallelContext
from rlx.parallel.packing import LocalBatch
from rlx.parallel.schedule import forward_only
from rlx.types.precision import BF16
from tests.dist.family_folders import sequences
from tests.dist.programs.families import packs_of
from tests.dist.programs.layouts import context_of, main


def run_case(folder: Path, context: ParallelContext) -> list[dict[str, Tensor]]:
    arch = read_architecture(folder)
    chunks = build_model(arch, context, BuildOptions(precision=BF16))
    load_hf(chunks, arch, folder, context)

    def hidden(chunk: nn.Module, batch: LocalBatch) -> Tensor:
        def process(*, hidden_states: Tensor, config: Any, **_: Any) -> Tensor:
            whole = gather_from_sequence_parallel_region(hidden_states, group=context.groups.tp)
            return (whole if config.sequence_parallel else hidden_states).squeeze(1)

        given = {"packed_seq_params": batch.packed_seq_params, "output_processor": process}
        found: Tensor = chunk(batch.tokens_1t, batch.positions_1t, None, **given)
        return found

    packs = packs_of(sequences(), context)
    seen = forward_only(chunks, packs, hidden, context)
    outputs = {fp32: forward_only(chunks, packs, token_head(context, arch, 0.7, fp32=fp32), context) for fp32 in (True, False)}
    return [
        {"hidden": states, "labels": batch.labels_t, "fp32": wide[1], "bf16": narrow[1]}
        for (batch, states), wide, narrow in zip(seen, outputs[True], outputs[False], strict=True)
    ]


def program(arguments: dict[str, Any], world_size: int) -> None:
    layout = {"tp": world_size, "sequence_parallel": world_size > 1}
    with context_of(layout, world_size) as context:
        results = [run_case(Path(folder), context) for folder in arguments["folders"]]
        if context.rank == 0:
            torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
