"""Engines of FP8 weights against bf16 ones on the same GPU, one after the other: generated tokens/s, publication, mismatch.

    python -m tests.benchmarks.bench_fp8 --out OUT [--shape 7B] [--apart]

256 requests of 512 tokens to a stock SGLang server of random weights, which rlx's publisher sends: through CUDA IPC on one GPU,
or with --apart over NCCL to a second one. Servers run in RLX_SGLANG_PYTHON where that is set. Prints a JSON object with both and
the ratio, also in OUT/fp8.json; exit status 1 when one of them failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from rlx.config.parts import EngineSettings
from rlx.engines.fp8 import write_fp8_folder
from tests.benchmarks.bench_gpu import Bench, server
from tests.benchmarks.gpu.models import SHAPES, write_config
from tests.benchmarks.gpu.trainer import config_of

FRACTION, LIMIT_S, HEALTHY_S = 0.5, 240.0, 240.0


def model_folder(name: str, model: Path, work: Path) -> Path:
    """What the server of this format starts from."""
    if name == "bf16":
        return model
    config = config_of(model)
    settings = EngineSettings.of(replace(config, rollout=replace(config.rollout, engine="sglang", fp8=True)))
    (work / "run").mkdir(exist_ok=True)
    return write_fp8_folder(settings, work / "run")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="7B", choices=list(SHAPES))
    parser.add_argument("--apart", action="store_true", help="the server on a GPU of its own, weights over NCCL")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path("/tmp/rlx-bench-fp8")
    shutil.rmtree(work, ignore_errors=True)
    model = write_config(args.shape, work / args.shape)
    os.environ.setdefault("SGLANG_ENABLE_JIT_DEEPGEMM", "0")
    transport = "stream" if args.apart else "ipc"
    bench = Bench(args.out, work, 2 if args.apart else 1)
    for name in ("bf16", "fp8"):
        folder, log = model_folder(name, model, work), args.out / f"server-{name}.log"
        extra = {"load-format": "auto"} if name == "fp8" else {}
        with server(folder, log, FRACTION, [1 if args.apart else 0], extra) as one:
            problem = one.wait_healthy(HEALTHY_S)
            if problem is not None:
                bench.fail(name, f"{problem}; its log ends:\n" + log.read_text(errors="replace")[-3000:])
                continue
            argv = [sys.executable, "-m", "tests.benchmarks.gpu.fp8", str(model), one.url, name, transport]
            bench.run(f"fp8-{name}", argv, LIMIT_S, CUDA_VISIBLE_DEVICES="0")
    found = bench.results
    if not bench.failed:
        found["tokens_s ratio"] = round(found["fp8"]["tokens_s"] / found["bf16"]["tokens_s"], 3)  # type: ignore[index]
    found |= {"shape": args.shape, "transport": transport}
    (args.out / "fp8.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
