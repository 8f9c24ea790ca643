"""Times what images cost an update of Qwen2.5-VL-3B's shape, against the same tokens without images, and the tower by itself.

    python -m tests.benchmarks.gpu.vision OUT [--tp 2] [--parts frozen,train] [--recompute full] [--profile]
    python -m tests.benchmarks.gpu.vision OUT --tiny --device cpu

Weights are random and made in memory. Each part is started anew on ``--tp`` ranks: ``frozen`` (the tower by itself, then updates
that keep its features from one to the next) and ``train`` (updates that learn the tower too). ``fresh`` updates are the first of
a batch that nothing scored: the tower runs in them. In a job, scores have made the features before the first update.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from rlx.data.images.pixels import image_folder
from rlx.processes.device import take_device
from rlx.processes.local_ranks import run_local_ranks, this_module
from rlx.types.layout import ParallelDims
from tests.benchmarks.gpu.models import write_config
from tests.benchmarks.gpu.pictures import TINY, WHOLE, Size, write_images

LIMIT_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tp", type=int, default=1, help="ranks, a GPU each")
    parser.add_argument("--parts", default="frozen,train")
    parser.add_argument("--part", choices=("frozen", "train"), help=argparse.SUPPRESS)
    parser.add_argument("--recompute", default="full", choices=("none", "selective", "full"))
    parser.add_argument("--tokens", type=int, default=8192, help="max_tokens_per_micro_batch")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, small pictures")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a fresh update")
    args = parser.parse_args()
    size = TINY if args.tiny else WHOLE
    args.dtype = "bf16" if args.device == "cuda" else "fp32"
    if args.part is not None:
        return run_rank(args, size)
    write_config(size.shape, args.out / "model")
    keys = write_images(image_folder(args.out / "run"), size)
    (args.out / "keys.json").write_text(json.dumps(keys))
    codes = []
    for part in args.parts.split(","):
        began = time.monotonic()
        codes.append(run_local_ranks(this_module("tests.benchmarks.gpu.vision", *sys.argv[1:], "--part", part), args.tp))
        print(f"{part}: exit status {codes[-1]} after {time.monotonic() - began:.0f} s", flush=True)
    return max(codes)


def run_rank(args: argparse.Namespace, size: Size) -> int:
    rank = int(os.environ["RANK"])
    device = take_device(args.device, rank)
    dims = ParallelDims(world_size=args.tp, tp=args.tp, sequence_parallel=args.tp > 1)
    # Megatron is imported once the device is settled.
    from rlx.parallel.context import build_context, connect, shut_down
    from tests.benchmarks.gpu.vision_updates import Bench

    connect(init_method="env://", rank=rank, world_size=args.tp, device=device, timeout_s=LIMIT_S)
    bench = Bench(args, size, build_context(dims, device, seed=0, timeout_s=LIMIT_S))
    if args.part == "frozen":
        bench.tower()
    bench.updates()
    shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
