"""One rank of ``rlx score``; started by it, once a rank, under torchrun's environment variables."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from rlx.arch.architecture import Architecture
from rlx.arch.families.registry import read_architecture
from rlx.cli.score import add_arguments, dims_of, read_sequences
from rlx.models.build import BuildOptions, build_model, freeze
from rlx.models.heads import token_head
from rlx.models.megatron_io import load_weights
from rlx.parallel.context import build_context, choose_device, connect, shut_down
from rlx.processes.environment import rank_environment
from rlx.trainer.scoring import score_sequences

_TIMEOUT_S = 600.0


def main(args: argparse.Namespace) -> int:
    arch = read_architecture(args.model)
    rows = score(args, arch, read_sequences(args.tokens, arch))
    if rows is not None:
        partial = args.out.with_name(args.out.name + ".partial")
        partial.write_text("".join(json.dumps({"logprobs": row}) + "\n" for row in rows))
        os.replace(partial, args.out)
    return 0


def score(args: argparse.Namespace, arch: Architecture, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
    """Join the world, build this rank's part, score. The rows, on rank 0; None elsewhere."""
    where, dims = rank_environment(), dims_of(args)
    device = choose_device("auto", where.local_rank)
    connect(init_method="env://", rank=where.rank, world_size=where.world_size, device=device, timeout_s=_TIMEOUT_S)
    context = build_context(dims, device, seed=0, timeout_s=_TIMEOUT_S)
    chunks = build_model(arch, context, BuildOptions(dtype=args.dtype))
    load_weights(chunks, arch, args.model, context)
    freeze(chunks)
    rows = score_sequences(chunks, token_head(context, arch), sequences, context, args.max_tokens)
    shut_down()
    return rows if where.rank == 0 else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rlx score", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
