"""``make bench-convert``: the converter against a plain copy of the same bytes and against transformers, in one run.

A random sharded checkpoint of Qwen2.5-1.5B's shape (3 GB, bf16) is converted by the command a user types. Times are
whole processes, imports included, the best of two alternating rounds; memory is the sum over the process tree.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
QWEN2_5_1_5B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5, "tie_word_embeddings": False,
}  # fmt: skip
MAX_COPY_RATIO, MAX_RESIDENT_BYTES, MIN_SPEEDUP, MAX_DRY_RUN_S = 2.0, 2 * 2**30, 2.0, 10.0
ROUND_TRIP = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""


def make_checkpoint(folder: Path, num_shards: int = 4) -> int:
    """Write the random checkpoint; its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN2_5_1_5B))
    shapes = list(_shapes())
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        names = shapes[shard * len(shapes) // num_shards : (shard + 1) * len(shapes) // num_shards]
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        generator = torch.Generator().manual_seed(shard)
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator) for name, shape in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn, kv = 1536, 8960, 256
    yield "model.embed_tokens.weight", (151936, hidden)
    for layer in range(28):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{at}self_attn.{name}_proj.bias", (rows,)
        yield f"{at}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}mlp.gate_proj.weight", (ffn, hidden)
        yield f"{at}mlp.up_proj.weight", (ffn, hidden)
        yield f"{at}mlp.down_proj.weight", (hidden, ffn)
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


@contextmanager
def peak_resident(pid: int) -> Iterator[list[int]]:
    """Samples the resident bytes of a process and all below it, 50 times a second; the list holds the highest sum."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            try:
                root = psutil.Process(pid)
                peak[0] = max(peak[0], sum(_resident(process) for process in (root, *root.children(recursive=True))))
            except psutil.NoSuchProcess:
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def timed(*command: str) -> tuple[float, int]:
    """(seconds, peak resident bytes) of ``python COMMAND``, which must succeed."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with peak_resident(process.pid) as peak:
        _, errors = process.communicate()
    seconds = time.perf_counter() - start
    assert process.returncode == 0, errors[-3000:]
    return seconds, peak[0]


def timed_copy(source: Path, target: Path) -> tuple[float, int]:
    """Seconds of copying the folder's files."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    return time.perf_counter() - start, 0


def best(rounds: int, folder: Path, *sides: Callable[[Path], tuple[float, int]]) -> list[tuple[float, int]]:
    """The least seconds and the highest memory of each side, the sides taking turns, each into a fresh folder."""
    found = [(float("inf"), 0)] * len(sides)
    for _ in range(rounds):
        for index, side in enumerate(sides):
            os.sync()  # what the side before left to be written is not this one's work
            seconds, resident = side(folder)
            found[index] = (min(found[index][0], seconds), max(found[index][1], resident))
            shutil.rmtree(folder, ignore_errors=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where 10 GB are free")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        source, target, back = Path(name, "hf"), Path(name, "out"), Path(name, "megatron")
        size = make_checkpoint(source)
        convert = ("-m", "converters", "hf-to-megatron", "--tokenizer", "none", "--hf", str(source), "--out")
        timed(*convert, str(back), "--tp", "2", "--pp", "2")
        to_hf = ("-m", "converters", "megatron-to-hf", "--tokenizer", "none", "--megatron", str(back), "--out")
        copy, there, there_cut, back_again, transformers = best(
            args.rounds,
            target,
            lambda out: timed_copy(source, out),
            lambda out: timed(*convert, str(out)),
            lambda out: timed(*convert, str(out), "--tp", "2", "--pp", "2"),
            lambda out: timed(*to_hf, str(out)),
            lambda out: timed("-c", ROUND_TRIP, str(source), str(out)),
        )
        config = Path(name, "70b.json")
        config.write_text(json.dumps(LLAMA_3_70B))
        dry = timed(*convert[:-3], "--hf", name, "--config", str(config), "--out", str(target), "--dry-run", "--tp=8", "--pp=4")
    print(f"{size / 1e9:.2f} GB, {len(os.sched_getaffinity(0))} cores")
    rows = {"plain copy": copy, "hf-to-megatron": there, "hf-to-megatron tp 2 pp 2": there_cut, "megatron-to-hf": back_again}
    for label, (seconds, resident) in (rows | {"from_pretrained + save_pretrained": transformers}).items():
        print(f"{label:<34} {seconds:7.2f} s  {seconds / copy[0]:5.2f} x copy  {resident / 2**30:5.2f} GiB")
    print(f"{'dry run of a 70B':<34} {dry[0]:7.2f} s")
    converters = (there, there_cut, back_again)
    ratio, resident = max(side[0] for side in converters) / copy[0], max(side[1] for side in converters)
    speedup = transformers[0] / max(there[0], there_cut[0])
    checks = (
        (f"at most {MAX_COPY_RATIO} x a plain copy: {ratio:.2f}", ratio <= MAX_COPY_RATIO),
        (f"at most 2 GiB resident: {resident / 2**30:.2f}", resident <= MAX_RESIDENT_BYTES),
        (f"at least {MIN_SPEEDUP} x as fast as transformers: {speedup:.2f}", speedup >= MIN_SPEEDUP),
        (f"dry run within {MAX_DRY_RUN_S} s: {dry[0]:.2f}", dry[0] <= MAX_DRY_RUN_S),
    )
    for text, met in checks:
        print(f"{'ok  ' if met else 'FAIL'} {text}")
    return 0 if all(met for _, met in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
