"""A model folder that is whole but for its numbers, and takes no torch and no time: for tests of what is read before a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlx.arch.families.registry import architecture_of
from rlx.arch.sizes import expected_shapes

SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "hidden_size": 96,
    "head_dim": 12,
    "intermediate_size": 240,
    "vocab_size": 131,
    "max_position_embeddings": 4096,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def write_model(folder: Path, config: Mapping[str, Any] = SHAPE) -> Path:
    """config.json, zeros for weights (a hole in a file), and a tokenizer of single characters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder / "model.safetensors", expected_shapes(architecture_of(config)))
    write_tokenizer(folder)
    return folder


def write_weights(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> None:
    """A safetensors file of zeros."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)


def write_tokenizer(folder: Path, num_tokens: int = 96) -> None:
    """<unk>, <eos>, the printable characters from ``!`` on, then words that no text has."""
    vocabulary = [
        "<unk>",
        "<eos>",
        *(chr(33 + number) for number in range(94)),
        *(f"<{number}>" for number in range(96, num_tokens)),
    ]
    special = {
        "id": 1,
        "content": "<eos>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [special],
        "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(vocabulary)}, "merges": []},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
