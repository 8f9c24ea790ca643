"""Write everything `make demo` needs: a tiny random model, its tokenizer and a task that only reward can teach.

The task is "next DIGIT =" -> the digit after it (9 is followed by 0); reward 1 when the last number of the answer is right,
else 0. An untrained model scores about 0.1, one that ignores the question cannot pass 0.1 either.

    python launch/demo/make_assets.py --out .demo

writes OUT/model (Hugging Face folder, fp32), OUT/train.jsonl and OUT/eval.jsonl; for fine-tuning OUT/answers.jsonl (chats),
OUT/preferences.jsonl (a right and a wrong answer to each question) and OUT/held-out-*.jsonl of both. It does nothing when
OUT was written by this same file before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SEED = 20240
NUM_TRAIN, NUM_EVAL = 1000, 100
END, PADDING = "<eos>", "<pad>"
# Qwen2's tokenizer is byte-level BPE, and transformers builds no other kind for a Qwen2 folder. "\u0120" is its space.
SYMBOLS = [*"0123456789", *"next", "\u0120", "="]
MERGES = [("n", "e"), ("x", "t"), ("ne", "xt"), ("\u0120", "=")]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} ={{ message['content'] }}"
    + END
    + "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %} ={% endif %}"
)


def main() -> None:
    """Parse the command line, and write unless everything is current."""
    parser = argparse.ArgumentParser(description="Write the demo's model, tokenizer and data.")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="folder to write (default: .demo)")
    out: Path = parser.parse_args().out
    stamp, fingerprint = out / "made-by.txt", hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == fingerprint:
        print(f"{out} is current")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_model(out / "model")
    write_rows(out / "train.jsonl", NUM_TRAIN, random.Random(SEED))
    write_rows(out / "eval.jsonl", NUM_EVAL, random.Random(SEED + 1))
    for name, num, seed in (("", NUM_TRAIN, SEED + 2), ("held-out-", NUM_EVAL, SEED + 3)):
        write_answers(out / f"{name}answers.jsonl", num, random.Random(seed))
        write_preferences(out / f"{name}preferences.jsonl", num, random.Random(seed))
    # Last, so that an interrupted run is not taken for a whole one.
    stamp.write_text(fingerprint)
    print(f"wrote {out}: model, train.jsonl, eval.jsonl, answers.jsonl, preferences.jsonl")


def write_model(folder: Path) -> None:
    """A Qwen2 of 2 layers with random weights, and its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    config = Qwen2Config(
        # Not a multiple of 4: tensor parallelism has to pad the vocabulary.
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.float().save_pretrained(folder, safe_serialization=True)


def make_tokenizer() -> Qwen2Tokenizer:
    """Tokens: ten digits, the word "next" and its parts, a space, an equals sign, <eos> and <pad>."""
    symbols = [*SYMBOLS, *(left + right for left, right in MERGES), END, PADDING]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=MERGES, unk_token=END, eos_token=END, pad_token=PADDING, chat_template=CHAT_TEMPLATE
    )


def questions(num: int, draw: random.Random) -> Iterator[dict[str, str]]:
    """Rows with a prompt and its label."""
    for _ in range(num):
        digit = draw.randrange(10)
        yield {"prompt": f"next {digit} =", "label": str((digit + 1) % 10)}


def write_rows(path: Path, num: int, draw: random.Random) -> None:
    """One JSON object a line."""
    write_lines(path, questions(num, draw))


def write_answers(path: Path, num: int, draw: random.Random) -> None:
    """Chats of a question and its right answer."""
    rows = ((row["prompt"].removesuffix(" ="), row["label"]) for row in questions(num, draw))
    chats = ([{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in rows)
    write_lines(path, ({"messages": chat} for chat in chats))


def write_preferences(path: Path, num: int, draw: random.Random) -> None:
    """Questions with the right answer and a wrong one."""
    for_each = ((row, draw.choice([digit for digit in "0123456789" if digit != row["label"]])) for row in questions(num, draw))
    write_lines(path, ({"prompt": row["prompt"], "chosen": row["label"], "rejected": wrong} for row, wrong in for_each))


def write_lines(path: Path, rows: Iterable[object]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
