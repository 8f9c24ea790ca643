"""A whole GRPO job of Qwen2.5-VL-3B's shape with random weights, as a user starts it: the trainer on one GPU, stock SGLang on the
next, pictures of 1,024 tokens that rlx draws. What each step took, and how far the engine's log-probs are from the trainer's.

    python -m tests.benchmarks.gpu.vision_job OUT [--steps 20] [--vision frozen] [key=value ...]
    python -m tests.benchmarks.gpu.vision_job OUT --tiny --device cpu --steps 2

The reward is the parity of an answer's token ids, so that every step has something to learn from and the weights move.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from rlx.data.images.pixels import MEAN, STD
from tests.benchmarks.gpu.job import SERVER
from tests.benchmarks.gpu.models import write_config, write_weights

END, PADDING = "<eos>", "<pad>"
# The names that config.json has for the ids of these tokens.
MARKS = {
    "vision_start_token_id": "<|vision_start|>",
    "image_token_id": "<|image_pad|>",
    "vision_end_token_id": "<|vision_end|>",
    "video_token_id": "<|video_pad|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %} ={% endif %}"
)
REWARD = '''"""By lot, as good as."""


def parity(prompt, response, label, trajectory, **columns):
    return float(sum(map(int, trajectory.token_ids)) % 2)
'''
PROMPTS, ANSWERS, ANSWER_TOKENS = 8, 8, 64
TIMES = ("step", "rollout", "score", "update", "sync")


def prepare(shape: str, pixels: int, out: Path) -> Path:
    """The model's folder: weights, a tokenizer of bytes, what its image processor does; and the reward's file."""
    folder = write_config(shape, out / "model")
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate([*sorted(ByteLevel.alphabet()), END, PADDING, *MARKS.values()])},
        merges=[],
        unk_token=END,
        eos_token=END,
        pad_token=PADDING,
        additional_special_tokens=list(MARKS.values()),
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    config |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": MEAN,
        "image_std": STD,
        "min_pixels": 56 * 56,
        "max_pixels": pixels**2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if not (folder / "model.safetensors").exists():
        write_weights(folder, torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    (out / "reward.py").write_text(REWARD)
    return folder


def settings_of(args: argparse.Namespace, folder: Path, pixels: int) -> dict[str, Any]:
    on_gpu = args.device == "cuda"
    image_tokens = (pixels // 28) ** 2
    engines: dict[str, Any] = {"engine": "embedded"}
    if on_gpu:
        # SGLang's own choice on these GPUs is fa3, whose kernels it may have to fetch.
        servers = SERVER | {"mm_attention_backend": args.mm_attention, "mem_fraction_static": 0.7}
        engines = {"engine": "sglang", "server_args": servers}
    return {
        "run": {
            "dir": str(args.out / "run"),
            "steps": args.steps,
            "overwrite": True,
            "export_hf": False,
            "failure_timeout_s": 150,
        },
        "model": {
            "path": str(folder),
            "dtype": "bf16" if on_gpu else "fp32",
            "vision": args.vision,
            "recompute": "full" if on_gpu else "none",
        },
        "cluster": {"device": args.device},
        "data": {
            "sources": {"count": {"path": "drawn:count", "args": {"pixels": pixels, "size": PROMPTS * args.steps, "noise": 0.1}}},
            "prompts_per_step": PROMPTS,
            "max_prompt_tokens": image_tokens + 256,
        },
        "rollout": {"num_engines": 1, "samples_per_prompt": ANSWERS, "max_new_tokens": ANSWER_TOKENS, **engines},
        "reward": {"name": f"{args.out / 'reward.py'}:parity"},
        "algorithm": {"name": "grpo", "kl_placement": "none"},
        "batching": {"max_tokens_per_micro_batch": 8192},
        "sync": {"timeout_s": 100},
        "checkpoint": {"at_end": False},
    }


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    for row in rows:
        parts = {name: round(row[f"perf/{name}_s"], 2) for name in TIMES if f"perf/{name}_s" in row}
        kept = {
            k: round(v, 5) for k, v in row.items() if k.startswith(("mismatch/logprob", "sync/", "memory/gpu", "reward/mean"))
        }
        print(f"step {row.get('step')}: {parts} {kept}", flush=True)
    steady = [row for row in rows if row.get("step", 0) > 1 and "perf/step_s" in row] or rows
    if not steady:
        return
    told: dict[str, Any] = {"steps": len(rows), "vision": args.vision}
    for name in (*(f"perf/{name}_s" for name in TIMES), "perf/tokens_per_s", "sync/publish_s"):
        found = [row[name] for row in steady if name in row]
        if found:
            told[name] = round(statistics.median(found), 3)
    mismatch = [row["mismatch/logprob_abs_mean"] for row in rows if "mismatch/logprob_abs_mean" in row]
    if mismatch:
        told |= {"mismatch_median": statistics.median(mismatch), "mismatch_largest": max(mismatch)}
    print("RESULT", json.dumps({f"vision_job/{args.shape}": told}), flush=True)


def run(argv: list[str], limit_s: float) -> int:
    """Its exit status; one that is late is asked to end, so that it takes its engines along."""
    process = subprocess.Popen(argv)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        return -1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--vision", default="frozen", choices=("frozen", "projector", "train"))
    parser.add_argument("--mm-attention", default="triton_attn", help="SGLang's attention in the tower (or sdpa, fa3)")
    parser.add_argument("--limit-s", type=float, default=480)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, small pictures")
    args, overrides = parser.parse_known_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    args.shape, pixels = ("vl-tiny", 224) if args.tiny else ("vl-3B", 896)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    began = time.monotonic()
    folder = prepare(args.shape, pixels, args.out)
    print(f"model made in {time.monotonic() - began:.0f} s", flush=True)
    config = args.out / "job.json"
    config.write_text(json.dumps(settings_of(args, folder, pixels)))
    began = time.monotonic()
    code = run([sys.executable, "-m", "rlx.cli.main", "train", str(config), *overrides], args.limit_s)
    print(f"the job took {time.monotonic() - began:.0f} s, exit status {code}", flush=True)
    metrics = args.out / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    report(rows, args)
    return code


if __name__ == "__main__":
    sys.exit(main())
