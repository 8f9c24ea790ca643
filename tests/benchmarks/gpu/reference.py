"""Log-probs of random sequences by transformers on the GPU, in fp32 and bf16. Run by ``bench_gpu``; knows no rlx."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main(model_dir: Path, out_dir: Path) -> None:
    draw = random.Random(3)
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    sequences = [[draw.randrange(vocab_size) for _ in range(length)] for length in (5, 64, 129, 300, 511)]
    (out_dir / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in sequences))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager").cuda().eval()
        rows = []
        for ids in sequences:
            tokens = torch.tensor([ids], device="cuda")
            with torch.no_grad():
                logprobs = model(tokens).logits[0, :-1].float().log_softmax(-1)
            rows.append(logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist())
        (out_dir / f"reference-{name}.jsonl").write_text("".join(json.dumps({"logprobs": row}) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
