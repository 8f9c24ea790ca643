"""``make bench-convert``: the converter against a plain copy of the same bytes and against transformers, in one run.

A random sharded checkpoint of Qwen2.5-1.5B's shape (3 GB, bf16) is converted by the command a user types. Times are
whole processes, imports included, the best of several alternating rounds; memory is the sum over the process tree. Every
side finds the source in the page cache and nothing waiting to be written, and none forces its output to the disk.
With ``--mbridge DIR`` (``pip install mbridge einops --no-deps --target DIR``), mbridge takes part.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
COPY, THERE, THERE_CUT, BACK = "plain copy", "hf-to-megatron", "hf-to-megatron tp 2 pp 2", "megatron-to-hf"
TRANSFORMERS, MBRIDGE = "from_pretrained + save_pretrained", "mbridge to torch_dist"
MBRIDGE_PROGRAM = Path(__file__).with_name("mbridge_on_cpu.py")
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


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds on the clock, seconds of all processors, and resident bytes at the highest."""

    seconds: float
    processor_seconds: float
    resident: int

    def best(self, other: Cost) -> Cost:
        """The less time and the more memory of both."""
        return Cost(
            min(self.seconds, other.seconds),
            min(self.processor_seconds, other.processor_seconds),
            max(self.resident, other.resident),
        )


@contextmanager
def peak_resident(pid: int) -> Iterator[list[int]]:
    """Samples the resident bytes of a process and all below it, 50 times a second; the list holds the highest sum."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], sum(map(_resident, _tree(pid))))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _tree(pid: int) -> Iterator[int]:
    """The process and all below it. Not by psutil, which reads every process of the machine each time."""
    yield pid
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in file.read_text().split():
                yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def timed(*command: str, path: Sequence[Path] = ()) -> Cost:
    """The cost of ``python COMMAND``, which must succeed; ``path`` is where else it finds modules."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.DEVNULL, stderr=errors)
        with peak_resident(process.pid) as peak:
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        assert process.returncode == 0, errors.read()[-3000:]
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peak[0])


def timed_copy(source: Path, target: Path) -> Cost:
    """The cost of copying the folder's files."""
    start, processor = time.perf_counter(), time.process_time()
    shutil.copytree(source, target)
    return Cost(time.perf_counter() - start, time.process_time() - processor, 0)


def without_mbridge(folder: Path | None) -> str | None:
    """Why mbridge does not take part; None if it does."""
    if folder is None:
        return "no --mbridge DIR"
    return None if (folder / "mbridge").is_dir() else f"{folder} has no mbridge"


def best(rounds: int, folder: Path, sides: Mapping[str, Callable[[Path], Cost]]) -> dict[str, Cost]:
    """The least time and the highest memory of each side, the sides taking turns, each into a fresh folder."""
    found: dict[str, Cost] = {}
    for _ in range(rounds):
        for label, side in sides.items():
            os.sync()  # what the side before left to be written is not this one's work
            cost = side(folder)
            found[label] = cost.best(found.get(label, cost))
            shutil.rmtree(folder, ignore_errors=True)
    return found


def measure(folder: Path, rounds: int, mbridge: Path | None) -> tuple[dict[str, Cost], Cost]:
    """The cost of every side on a checkpoint made in ``folder``, and that of the dry run."""
    source, target, back = folder / "hf", folder / "out", folder / "megatron"
    print(f"{make_checkpoint(source) / 1e9:.2f} GB, {len(os.sched_getaffinity(0))} cores")
    convert = ("-m", "converters", "hf-to-megatron", "--tokenizer", "none", "--hf", str(source), "--out")
    cut = ("--tp", "2", "--pp", "2")
    timed(*convert, str(back), *cut)
    to_hf = ("-m", "converters", "megatron-to-hf", "--tokenizer", "none", "--megatron", str(back), "--out")
    sides: dict[str, Callable[[Path], Cost]] = {
        COPY: lambda out: timed_copy(source, out),
        THERE: lambda out: timed(*convert, str(out)),
        THERE_CUT: lambda out: timed(*convert, str(out), *cut),
        BACK: lambda out: timed(*to_hf, str(out)),
        TRANSFORMERS: lambda out: timed("-c", ROUND_TRIP, str(source), str(out)),
    }
    missing = without_mbridge(mbridge)
    if mbridge is not None and missing is None:
        sides[MBRIDGE] = lambda out: timed(str(MBRIDGE_PROGRAM), str(source), str(out), path=(mbridge,))
    else:
        print(f"mbridge does not take part: {missing}")
    costs = best(rounds, target, sides)
    config = folder / "70b.json"
    config.write_text(json.dumps(LLAMA_3_70B))
    dry = (*convert[:-3], "--hf", str(folder), "--config", str(config), "--out", str(target), "--dry-run", "--tp=8", "--pp=4")
    return costs, timed(*dry)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where 10 GB are free")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mbridge", type=Path, metavar="DIR", help="where mbridge is installed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        costs, dry = measure(Path(name), args.rounds, args.mbridge)
    copy = costs[COPY]
    print(f"{'':<34} {'clock':>9} {'':>11} {'processors':>13} {'resident':>12}")
    for label, cost in costs.items():
        times = f"{cost.seconds:7.2f} s {cost.seconds / copy.seconds:6.2f} copy {cost.processor_seconds:11.2f} s"
        print(f"{label:<34} {times} {cost.resident / 2**30:8.2f} GiB")
    print(f"{'dry run of a 70B':<34} {dry.seconds:7.2f} s {'':>11} {dry.processor_seconds:11.2f} s")
    there, back = (costs[THERE], costs[THERE_CUT]), costs[BACK]
    slowest = max(cost.seconds for cost in there)
    ratio, resident = max(slowest, back.seconds) / copy.seconds, max(cost.resident for cost in (*there, back))
    checks = [
        (f"at most {MAX_COPY_RATIO} x a plain copy: {ratio:.2f}", ratio <= MAX_COPY_RATIO),
        (f"at most 2 GiB resident: {resident / 2**30:.2f}", resident <= MAX_RESIDENT_BYTES),
        (f"dry run within {MAX_DRY_RUN_S} s: {dry.seconds:.2f}", dry.seconds <= MAX_DRY_RUN_S),
    ]
    for label in (TRANSFORMERS, MBRIDGE):
        if label in costs:
            speedup = costs[label].seconds / slowest
            checks.append((f"at least {MIN_SPEEDUP} x as fast as {label}: {speedup:.2f}", speedup >= MIN_SPEEDUP))
    for text, met in checks:
        print(f"{'ok  ' if met else 'FAIL'} {text}")
    return 0 if all(met for _, met in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
