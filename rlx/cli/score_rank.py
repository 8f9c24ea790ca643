"""One rank of ``rlx score``; started by it, once a rank, under torchrun's environment variables."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from importlib import import_module
from pathlib import Path

from rlx.arch.families.registry import read_architecture
from rlx.cli.score import add_arguments, read_asked
from rlx.processes.device import take_device
from rlx.processes.environment import rank_environment


def main(args: argparse.Namespace) -> int:
    arch = read_architecture(args.model)
    asked = read_asked(args.tokens, args.model, arch, args.images)
    where = rank_environment()
    device = take_device(args.device, where.local_rank)
    # It imports Megatron, which is to find the device settled.
    rows = import_module("rlx.cli.score_model").score(args, arch, asked, where, device)
    if rows is not None:
        broken = next((number for number, row in enumerate(rows, start=1) if not all(map(math.isfinite, row))), None)
        if broken is not None:
            raise ValueError(
                f"log-probs of line {broken} are not finite: weights in {args.model} are, or overflow in {args.dtype}"
            )
        partial = args.out.with_name(args.out.name + ".partial")
        partial.write_text("".join(json.dumps({"logprobs": row}) + "\n" for row in rows))
        os.replace(partial, args.out)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="rlx score", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--images", required=True, type=Path, help="the folder in which they are taken in already")
    sys.exit(main(parser.parse_args()))
