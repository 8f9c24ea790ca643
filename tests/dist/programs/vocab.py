"""Vocabulary-parallel log-probs and entropy on this rank's rows: values and gradients, chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from rlx.parallel import vocab
from rlx.parallel.context import ParallelContext
from rlx.types.layout import ParallelDims
from tests.dist.programs.layouts import context_of, main


def run_case(case: dict[str, Any], context: ParallelContext) -> dict[str, torch.Tensor]:
    data = torch.load(case["data"], weights_only=True)
    size = context.dims.tp
    rows = -(-data["weight"].shape[0] // size)
    padded = torch.zeros(rows * size, data["weight"].shape[1], dtype=data["weight"].dtype)
    padded[: data["weight"].shape[0]] = data["weight"]
    # Padding rows must not matter, whatever they hold.
    padded[data["weight"].shape[0] :] = 7.0
    shard = vocab.vocab_shard(context.groups.tp, rows * size, data["weight"].shape[0])
    hidden = data["hidden"].clone().requires_grad_()
    weight = padded[shard.first : shard.first + rows].clone().requires_grad_()
    vocab.CHUNK_BYTES["cpu"] = case["chunk_bytes"]
    logprobs, entropy = vocab.logprobs_and_entropy(hidden, weight, data["labels"], shard, vocab.LogitScaling(**case["scaling"]))
    (logprobs * data["logprob_slope"] + entropy * data["entropy_slope"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    dist.all_reduce(hidden.grad, group=context.groups.tp)
    pieces = [torch.empty_like(weight) for _ in range(size)]
    dist.all_gather(pieces, weight.grad, group=context.groups.tp)
    return {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "hidden_grad": hidden.grad,
        "weight_grad": torch.cat(pieces)[: data["weight"].shape[0]],
    }


def program(arguments: dict[str, Any], world_size: int) -> None:
    with context_of({"tp": world_size}, world_size) as context:
        assert context.dims == ParallelDims(world_size=world_size, tp=world_size)
        results = [run_case(case, context) for case in arguments["cases"]]
        if context.rank == 0:
            torch.save(results, arguments["out"])


if __name__ == "__main__":
    main(program)
