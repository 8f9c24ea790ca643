"""Tiny random vision-language checkpoints with awkward sizes, their images, and what transformers computes from them in fp32.

Runs as a program of its own, free of rlx: its CPU backend replaces factories that transformers needs as they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.dist.vision_folders import (
    END,
    GRIDS,
    IMAGE,
    MERGE,
    PATCH,
    START,
    VIDEO,
    VOCAB_SIZE,
    Sequence,
    folder_of,
    grid_of,
    sequences,
)

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0, "mrope_section": [1, 2, 3]},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_PATCHES = {"patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "num_heads": 4}
_WINDOWED = {"depth": 3, "hidden_size": 32, "intermediate_size": 44, "out_hidden_size": 48, "window_size": 112}


def qwen2_5_vl(*, tied: bool = False, **text: Any) -> PreTrainedModel:
    vision = _PATCHES | _WINDOWED | {"fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=_TEXT | text, vision_config=vision, tie_word_embeddings=tied, **_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen2_vl(*, tied: bool = False, **text: Any) -> PreTrainedModel:
    vision = _PATCHES | {"depth": 3, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_TEXT | text, vision_config=vision, tie_word_embeddings=tied, **_IDS)
    return Qwen2VLForConditionalGeneration(config)


CASES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2.5-vl tied": lambda: qwen2_5_vl(tied=True),
    "qwen2.5-vl one kv head": lambda: qwen2_5_vl(num_key_value_heads=1),
    "qwen2-vl": lambda: qwen2_vl(),
}


def make_images(root: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Canonical files below ``root/images``; their keys, and transformers' patches, by name."""
    draw = np.random.default_rng(0)
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, do_resize=False)
    keys, patches = {}, {}
    for name, sides in GRIDS.items():
        height, width = (side * PATCH * MERGE for side in sides)
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        keys[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
        file = root / "images" / keys[name][:2] / f"{keys[name]}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(buffer.getvalue())
        found = processor(images=[image], return_tensors="pt")
        assert tuple(found["image_grid_thw"][0].tolist()) == grid_of(name)
        patches[name] = found["pixel_values"]
    return keys, patches


def _write(model: Any, root: Path, case: str, seed: int) -> None:
    """The same weights in both dtypes; norms and biases away from ones and zeros, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            is_norm = parameter.ndim == 1
            scale = 0.2 if is_norm else 1.2 / parameter[0].numel() ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (1.0 if is_norm else 0.0))
    model.save_pretrained(folder_of(root, case, "fp32"))
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "min_pixels": (PATCH * MERGE) ** 2}
    (folder_of(root, case, "fp32") / "preprocessor_config.json").write_text(json.dumps(sizes))
    model.to(torch.bfloat16).save_pretrained(folder_of(root, case, "bf16"))


def logprobs(model: Any, sequence: Sequence, patches: dict[str, Tensor]) -> Tensor:
    """Of tokens 1 and on of a sequence on its own, features at its spans alone."""
    ids = torch.tensor([sequence.token_ids])
    is_image = torch.zeros_like(ids)
    for name, start in sequence.images:
        is_image[0, start : start + GRIDS[name][0] * GRIDS[name][1]] = 1
    embeddings, more = model.get_input_embeddings()(ids), {}
    if sequence.images:
        grids = torch.tensor([grid_of(name) for name, _ in sequence.images])
        pixels = torch.cat([patches[name] for name, _ in sequence.images])
        features = model.model.visual(pixels, grid_thw=grids).pooler_output
        embeddings = embeddings.masked_scatter(is_image[..., None].bool(), features)
        more["position_ids"], _ = model.model.get_rope_index(ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids)
    logits = model(inputs_embeds=embeddings, use_cache=False, **more).logits[0, :-1]
    found: Tensor = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return found


def _reference(folder: Path, kind: type[PreTrainedModel], patches: dict[str, Tensor]) -> dict[str, Any]:
    """Log-probs of each sequence on its own, and the gradients of the mean over the answers' tokens."""
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    total = sum(len(sequence.token_ids) - sequence.asked for sequence in sequences())
    rows = []
    for sequence in sequences():
        row = logprobs(model, sequence, patches)
        (-row[sequence.asked - 1 :].sum() / total).backward()
        rows.append(row.detach())
    names = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): parameter.grad
        for name, parameter in model.named_parameters()
    }
    return {"logprobs": rows, "grads": names}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    keys, patches = make_images(root)
    (root / "keys.json").write_text(json.dumps(keys))
    found = {}
    for seed, (case, make) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = make()
        _write(model, root, case, seed)
        found[case] = _reference(folder_of(root, case, "fp32"), type(model), patches)
    torch.save(found | {"patches": patches}, root / "reference.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
