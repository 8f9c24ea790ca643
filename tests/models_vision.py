"""Tiny random checkpoints with a tower, pictures for them, and transformers' word on what they say.

A picture is its canonical file already: its size is a multiple of what the tower merges, so nobody resizes it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rlx.arch.families.registry import architecture_of
from rlx.arch.vision import Vision
from rlx.data.images.grid import num_image_tokens
from rlx.data.images.pixels import image_file
from rlx.types.rollout import ImageSpan

PATCH, MERGE, TEMPORAL = 14, 2, 2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
    "<|video_pad|>",
)
START, END, IMAGE = (256 + SPECIAL.index(name) for name in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"))
VOCAB = 269  # the last ids have no token
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Windows of 4 by 4 merged patches, so that a picture of 5 by 8 has several; the tower's own width is no multiple of 32.
_TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "in_channels": 3,
        "out_hidden_size": 128,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        "hidden_act": "silu",
    },
    "qwen2_vl": {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 128,
        "mlp_ratio": 2,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "hidden_act": "quick_gelu",
    },
}


def make(family: str = "qwen2_5_vl", seed: int = 0, *, tied: bool = False, **text: object) -> PreTrainedModel:
    """Random weights in which biases, norms and the tower matter. ``text`` overrides fields of the text part."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        text_config=_TEXT | {"tie_word_embeddings": tied} | text,
        vision_config=_TOWERS[family],
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1 / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(1, 0.1)
    return model.requires_grad_(False)


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The whole folder: weights under their names on disk, tokenizer, processor."""
    model.save_pretrained(folder)
    if model.config.model_type == "qwen2_vl":  # published ones have the name that SGLang reads; transformers writes its own
        content = json.loads((folder / "config.json").read_text())
        content["vision_config"]["in_chans"] = content["vision_config"]["in_channels"]
        (folder / "config.json").write_text(json.dumps(content))
    save_processor(folder, model.config.model_type)
    return folder


def save_processor(folder: Path, family: str = "qwen2_5_vl") -> None:
    """Bytes for tokens, the special ones, a chat template, and how pictures become patches."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == IMAGE
    processor = "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen2VLProcessor"
    sizes = {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "merge_size": MERGE, "image_mean": MEAN, "image_std": STD}
    limits = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 64}
    images = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": processor, **sizes, **limits}
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": processor, **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))


class Picture(NamedTuple):
    """An image before it has a place."""

    key: str
    grid: tuple[int, int, int]


def write_picture(folder: Path, seed: int, rows: int, columns: int) -> Picture:
    """The canonical file of waves and noise of ``rows`` by ``columns`` merged patches; its key and grid."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0 : rows * MERGE * PATCH, 0 : columns * MERGE * PATCH]
    waves = np.stack([127 + 120 * np.sin(x / 9.0 + c + seed) * np.cos(y / (7.0 + c)) for c in range(3)], -1)
    written = io.BytesIO()
    Image.fromarray((waves + draw.normal(0, 5, waves.shape)).clip(0, 255).astype("uint8")).save(written, format="png")
    key = sha256(written.getvalue()).hexdigest()
    file = image_file(folder, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(written.getvalue())
    return Picture(key, (1, rows * MERGE, columns * MERGE))


def expand(parts: Sequence[Sequence[int] | Picture]) -> tuple[list[int], tuple[ImageSpan, ...]]:
    """Token ids and spans of texts and pictures in a row."""
    ids: list[int] = []
    spans: list[ImageSpan] = []
    for part in parts:
        if isinstance(part, Picture):
            spans.append(ImageSpan(key=part.key, start=len(ids) + 1, grid=part.grid))
            ids += [START, *[IMAGE] * num_image_tokens(part.grid, MERGE), END]
        else:
            ids += part
    return ids, tuple(spans)


def vision_of(model: PreTrainedModel) -> Vision:
    """The tower, as rlx reads it from the configuration."""
    vision = architecture_of(model.config.to_dict()).vision
    assert vision is not None
    return vision


def patches(file: Path) -> torch.Tensor:
    """What transformers' image processor makes of a picture."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=TEMPORAL, merge_size=MERGE, min_pixels=1, max_pixels=10**9
    )
    found: torch.Tensor = processor(images=[Image.open(file).convert("RGB")], return_tensors="pt")["pixel_values"]
    return found


@torch.no_grad()
def hidden(model: PreTrainedModel, ids: Sequence[int], spans: Sequence[ImageSpan], folder: Path) -> torch.Tensor:
    """What the output layer gets, [L, D] of one sequence, by embeddings and positions that are given: ids outside of spans are
    text."""
    tokens = torch.tensor([list(ids)])
    inner: Any = model.model
    embeddings = inner.get_input_embeddings()(tokens).clone()
    types = torch.zeros_like(tokens)
    for span in spans:
        stretch = slice(span.start, span.start + num_image_tokens(span.grid, MERGE))
        pixels, grid = patches(image_file(folder, span.key)), torch.tensor([span.grid])
        embeddings[0, stretch] = inner.visual(pixels, grid_thw=grid).pooler_output
        types[0, stretch] = 1
    grids = torch.tensor([span.grid for span in spans]) if spans else None
    positions, _ = inner.get_rope_index(tokens, mm_token_type_ids=types, image_grid_thw=grids)
    found: torch.Tensor = inner(inputs_embeds=embeddings, position_ids=positions).last_hidden_state[0]
    return found


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Sequence[int], spans: Sequence[ImageSpan], folder: Path) -> torch.Tensor:
    """float64 [L, V] of one sequence."""
    output: Any = model.get_output_embeddings()
    found: torch.Tensor = output(hidden(model, ids, spans, folder)).double()
    return found


def scores(model: PreTrainedModel, ids: Sequence[int], spans: Sequence[ImageSpan], folder: Path) -> list[float]:
    """Log-probs of tokens 1..L-1, those of placeholders included."""
    found = logits(model, ids, spans, folder)[:-1].log_softmax(-1)
    return found.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].tolist()


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """By their names on disk; a tied head once."""
    found = {}
    for name, tensor in model.state_dict().items():
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            found[name.removeprefix("model.") if ".visual." in name else name.replace("language_model.", "")] = tensor
    return found
