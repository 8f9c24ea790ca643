"""A whole co-located GRPO job of a model with random weights, as a user starts it; what each step took.

    python -m tests.benchmarks.gpu.job SHAPE OUT [--steps N] [--engine-tp N] [--engines N] [key=value ...]

Answers have 1,024 tokens (an end token is as likely as any other). Run by ``bench_gpu``; needs stock SGLang beside rlx.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.gpu.models import write_config, write_weights

ROOT = Path(__file__).resolve().parents[3]
SERVER = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "cuda_graph_backend_prefill": "disabled",
    "mem_fraction_static": 0.6,
    "load_format": "dummy",
}


def prepare(shape: str, out: Path) -> Path:
    """The model's folder with the demo's tokenizer, and prompts that are numbers."""
    folder = write_config(shape, out / "model")
    if not (folder / "model.safetensors").exists():
        write_weights(folder, torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    subprocess.run([sys.executable, str(ROOT / "launch/demo/make_assets.py"), "--out", str(out / "demo")], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"):
        if (out / "demo" / "model" / name).exists():
            (folder / name).write_bytes((out / "demo" / "model" / name).read_bytes())
    rows = [{"prompt": " ".join(str(number * 7 + digit) for digit in range(24)), "label": "1"} for number in range(4096)]
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tell(name: str, run_dir: Path, ranks: int) -> None:
    """What each step of a run took, and the medians of those after the first."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()] if run_dir.exists() else []
    names = ["step", "rollout", "score", "reference", "update", "sync"]
    for row in rows:
        parts = {part: round(row[f"perf/{part}_s"], 2) for part in names if f"perf/{part}_s" in row}
        kept = {k: round(v, 4) for k, v in row.items() if k.startswith(("sync/", "memory/gpu", "mismatch/logprob"))}
        print(f"step {row.get('step')}: {row.get('perf/tokens_per_s', 0) / ranks:.0f} tokens/s a GPU {parts} {kept}", flush=True)
    steady = [row for row in rows if row.get("step", 0) > 1 and "perf/tokens_per_s" in row]
    log = run_dir / "logs" / "trainer-0.log"
    if log.exists():
        print(*[line[25:] for line in log.read_text().splitlines() if " weight sync " in line], sep="\n", flush=True)
    if steady:
        told = {"tokens_per_s_per_gpu": round(statistics.median(row["perf/tokens_per_s"] for row in steady) / ranks)}
        for part in names:
            if f"perf/{part}_s" in steady[0]:
                told[f"{part}_s"] = round(statistics.median(row[f"perf/{part}_s"] for row in steady), 2)
        told["publish_s_worst"] = round(max(row.get("sync/publish_s", 0.0) for row in steady), 3)
        print("RESULT", json.dumps({f"job/{name}": told}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape")
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=300)
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    folder = prepare(args.shape, args.out)
    print(f"model made in {time.monotonic() - began:.0f} s", flush=True)
    run_dir = args.out / f"run-{args.name or args.engine_tp}"
    settings: dict[str, object] = {
        "run": {"dir": str(run_dir), "steps": args.steps, "overwrite": True, "export_hf": False, "failure_timeout_s": 100},
        "model": {"path": str(folder), "dtype": "bf16"},
        "cluster": {"device": "cuda", "colocated": True, "num_trainer_ranks": args.engines * args.engine_tp},
        "parallel": {"tp": args.engines * args.engine_tp, "sequence_parallel": True},
        "data": {"train": str(args.out / "train.jsonl"), "prompts_per_step": 32, "max_prompt_tokens": 256},
        "rollout": {
            "engine": "sglang",
            "num_engines": args.engines,
            "tp": args.engine_tp,
            "samples_per_prompt": 8,
            "max_new_tokens": 1024,
            "server_args": SERVER,
        },
        "reward": {"name": "numeric"},
        "algorithm": {"name": "grpo", "kl_placement": "none"},
        "batching": {"max_tokens_per_micro_batch": 16384},
        "sync": {"timeout_s": 60},
        "checkpoint": {"at_end": False},
    }
    config = args.out / f"job-{args.name or args.engine_tp}.json"
    config.write_text(json.dumps(settings))
    argv = [sys.executable, "-m", "rlx.cli.main", "train", str(config), *overrides]
    began = time.monotonic()
    try:
        code = subprocess.run(argv, timeout=args.limit_s, check=False).returncode
    except subprocess.TimeoutExpired:
        code = -1
    tell(f"{args.shape} {args.name}", run_dir, args.engines * args.engine_tp)
    return code


if __name__ == "__main__":
    sys.exit(main())
