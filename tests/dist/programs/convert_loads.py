"""Loads converted checkpoints in many layouts, through rlx and through stock ``dist_checkpointing``; saves a stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from rlx.arch.families.registry import read_architecture
from rlx.models.build import BuildOptions, build_model
from rlx.models.hf.io import load_hf
from rlx.models.megatron_io import load_weights
from rlx.parallel.context import ParallelContext
from rlx.parallel.optimizer import content_metadata
from tests.dist.programs.layouts import context_of, main


def same(found: Any, expected: Any) -> bool:
    """Bit-equal parameters (one of them has NaNs), loaded from bf16 into fp32 or not."""
    chunks = zip(found, expected, strict=True)
    pairs = [pair for x, y in chunks for pair in zip(x.parameters(), y.parameters(), strict=True)]
    return all(torch.equal(a.data.view(torch.int32), b.data.view(torch.int32)) for a, b in pairs)


def poisoned(arch: Any, context: ParallelContext, head: Any = "token") -> Any:
    """Chunks whose every weight is visibly not loaded."""
    chunks = build_model(arch, context, BuildOptions(), head=head)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if head == "token" or not name.startswith("output_layer."):
                    parameter.fill_(float("nan"))
    return chunks


def stock_load(chunks: Any, folder: str) -> Any:
    """Stock Megatron, with everything that the model itself describes; also what it misses and what it does not know."""
    wanted = {f"chunk{i}": chunk.sharded_state_dict(metadata=content_metadata()) for i, chunk in enumerate(chunks)}
    loaded, missing, unexpected = dist_checkpointing.load(wanted, folder, strict=StrictHandling.RETURN_ALL)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"chunk{index}"])
    return sorted(map(str, missing)), sorted(map(str, unexpected))


def one_layout(case: dict[str, str], context: ParallelContext) -> dict[str, Any]:
    arch = read_architecture(case["hf"])
    expected = build_model(arch, context, BuildOptions())
    load_hf(expected, arch, case["hf"], context)
    ours, stock = poisoned(arch, context), poisoned(arch, context)
    load_weights(ours, arch, case["megatron"], context)
    missing, unexpected = stock_load(stock, case["megatron"])
    critic, critic_expected = poisoned(arch, context, "value"), poisoned(arch, context, "value")
    load_weights(critic, arch, case["megatron"], context)
    load_hf(critic_expected, arch, case["hf"], context)
    found = {"ours": same(ours, expected), "stock": same(stock, expected), "critic": same(critic, critic_expected)}
    everyone = context.gather_objects(found)
    if "stock_save" in case:
        if context.rank == 0:
            Path(case["stock_save"]).mkdir()
        context.barrier()
        state = expected[0].sharded_state_dict(metadata=content_metadata())
        dist_checkpointing.save(state, case["stock_save"], content_metadata=content_metadata())
    return {key: all(rank[key] for rank in everyone) for key in found} | {"missing": missing, "unexpected": unexpected}


def program(arguments: dict[str, Any], world_size: int) -> None:
    results: dict[str, Any] = {}
    for name, layout in arguments["layouts"].items():
        with context_of(layout, world_size) as context:
            for case_name, case in arguments["cases"].items():
                own = case if layout.get("tp") == 2 else {key: case[key] for key in ("hf", "megatron")}
                results[f"{case_name} {name}"] = one_layout(own, context)
            for case_name, folder in arguments.get("broken", {}).items():
                try:
                    load_weights(poisoned(read_architecture(folder), context), read_architecture(folder), folder, context)
                    results[f"{case_name} {name}"] = "loaded"
                except (ValueError, RuntimeError) as error:
                    results[f"{case_name} {name}"] = str(error)
    if dist.get_rank() == 0:
        torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
