"""Write everything `make demo-vision` needs: a tiny Qwen2.5-VL, its tokenizer and image processor, and pictures of numbers.

The task is to name the digit that a picture shows, somewhere, in some size and colours, under noise; reward 1 when the last
number of the answer is right, else 0. As in real models the tower is pre-trained: here it is taught to tell digits apart, by a
linear layer that is then thrown away. The language model is taught the form of an answer alone, a digit at random: it scores
about 0.1 whatever it sees, and only reward can teach it to name what the tower shows it.

    python launch/demo/make_vision.py --out .demo/vision

writes OUT/model (Hugging Face folder, fp32), OUT/train.jsonl, OUT/eval.jsonl (pictures of which none is in train.jsonl) and
OUT/blank.jsonl (pictures without a number, each with a label at random), their pictures in OUT/pictures. It does nothing when
OUT was written by these same files before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.utils import logging

from rlx.data.drawn import canvas, number
from rlx.data.drawn.canvas import png
from rlx.data.drawn.number import Number
from rlx.data.images.pixels import MEAN, STD

SEED = 20240
NUM_TRAIN, NUM_EVAL, NUM_BLANK = 2000, 200, 200
SIDE, PATCH, MERGE, WIDTH = 56, 14, 2, 64
GRID = SIDE // PATCH
NUM_PATCHES, NUM_TOKENS = GRID**2, (GRID // MERGE) ** 2

# How pictures spread while the tower is taught: those of one size in the middle first, at last as those of the task.
STAGES = (0.0, 0.25, 0.5, 0.75, 1.0)
STAGE_PICTURES, LAST_PICTURES = 3000, 10000
STEPS, BATCH = 1000, 64
FORM_STEPS = 150

END, PADDING = "<eos>", "<pad>"
START, IMAGE, CLOSE, VIDEO = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"
# Qwen2's tokenizer is byte-level BPE, and transformers builds no other kind for a Qwen2 folder. "\u0120" is its space.
SYMBOLS = [*"0123456789", *"number", "\u0120", "="]
MERGES = [("n", "u"), ("m", "b"), ("e", "r"), ("nu", "mb"), ("numb", "er"), ("\u0120", "=")]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} ={{ message['content'] }}"
    + END
    + "{% elif message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    + "{% if part['type'] == 'image' %}"
    + START
    + IMAGE
    + CLOSE
    + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %} ={% endif %}"
)


def main() -> None:
    """Parse the command line, and write unless everything is current."""
    parser = argparse.ArgumentParser(description="Write the vision demo's model, tokenizer and pictures.")
    parser.add_argument("--out", type=Path, default=Path(".demo/vision"), help="folder to write (default: .demo/vision)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"batches that teach the tower (default: {STEPS})")
    arguments = parser.parse_args()
    out: Path = arguments.out
    makers = (Path(__file__), *(Path(str(module.__file__)) for module in (canvas, number)))
    made_by = hashlib.sha256(b"".join(maker.read_bytes() for maker in makers)).hexdigest()
    stamp, fingerprint = out / "made-by.txt", f"{made_by} {arguments.steps}"
    if stamp.is_file() and stamp.read_text() == fingerprint:
        print(f"{out} is current")
        return
    # How a sum is split over threads decides how it is rounded, and after 1,000 batches which tower it is.
    torch.set_num_threads(2)
    print(f"making {out}: pictures, and a model whose tower is taught to see first (once, about a minute)", flush=True)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    write_rows(out)
    write_model(out / "model", arguments.steps)
    # Last, so that an interrupted run is not taken for a whole one.
    stamp.write_text(fingerprint)
    print(f"wrote {out}: model, train.jsonl, eval.jsonl, blank.jsonl, pictures")


def task(spread: float = 1.0) -> Number:
    """How digits are drawn: all about as large and in the middle at 0, as the task has them at 1."""
    low, high = 0.42 - 0.12 * spread, 0.42 + 0.13 * spread
    return Number(pixels=SIDE, min_digits=1, max_digits=1, min_height=low, max_height=high, spread=spread, noise=0.05)


def write_rows(out: Path) -> None:
    """Pictures to train on, held-out ones and blank ones; no two are the same."""
    drawn = task()
    seen: set[str] = set()
    for name, num in (("train", NUM_TRAIN), ("eval", NUM_EVAL), ("blank", NUM_BLANK)):
        draw = random.Random(f"{SEED} {name}")
        rows = []
        while len(rows) < num:
            one = drawn.draw(draw)
            data = png(drawn.blank(draw) if name == "blank" else one.picture)
            key = hashlib.sha256(data).hexdigest()
            if key not in seen:
                seen.add(key)
                file = f"pictures/{name}-{len(rows):04}.png"
                (out / file).write_bytes(data)
                content = [{"type": "image"}, {"type": "text", "text": "number"}]
                rows.append({"messages": [{"role": "user", "content": content}], "images": [file], "label": one.answer})
        write_lines(out / f"{name}.jsonl", rows)


def write_lines(path: Path, rows: Iterable[object]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_model(folder: Path, steps: int) -> None:
    """A Qwen2.5-VL of 2 layers and a tower of 3 blocks, its tokenizer and what its image processor does."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    model = make_model(tokenizer)
    teach_tower(model.model.visual, steps)
    teach_form(model, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, safe_serialization=True)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": MEAN,
        "image_std": STD,
        "min_pixels": SIDE**2,
        "max_pixels": SIDE**2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def make_tokenizer() -> Qwen2Tokenizer:
    """Tokens: ten digits, the word "number" and its parts, a space, an equals sign, those of images, <eos> and <pad>."""
    special = [START, IMAGE, CLOSE, VIDEO]
    symbols = [*SYMBOLS, *(left + right for left, right in MERGES), END, PADDING, *special]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=MERGES,
        unk_token=END,
        eos_token=END,
        pad_token=PADDING,
        additional_special_tokens=special,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Qwen2Tokenizer) -> Any:
    """With random weights."""
    text = {
        # Not a multiple of 4: tensor parallelism has to pad the vocabulary.
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 3,
        "hidden_size": WIDTH,
        "num_heads": 4,
        "intermediate_size": 128,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    start, image, close, video = (tokenizer.convert_tokens_to_ids(token) for token in (START, IMAGE, CLOSE, VIDEO))
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=start,
        vision_end_token_id=close,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    AttentionInterface.register("flash_equal_pictures", attend)
    # A name with "flash" in it is called once for all pictures, and refused by the constructor.
    model.model.visual.config._attn_implementation = "flash_equal_pictures"
    return model


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """[1, H, N, K] each -> [1, N, H, K]: each picture's patches see one another. A window is larger than a picture."""
    q, k, v = (x[0].unflatten(1, (-1, NUM_PATCHES)).transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=options["scaling"]).transpose(1, 2).flatten(0, 1)[None], None


class OneFrame(nn.Module):
    """The tower's first layer for stills: two frames that are the same, with the same weights, are one with twice the weight.
    What it projects on to begin with are the waves of which pictures have most, of any colour alike: from random directions
    the tower takes many times as long to see anything."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3 * PATCH**2, WIDTH, bias=False)
        waves = torch.tensor([[math.cos(math.pi * (x + 0.5) * f / PATCH) for x in range(PATCH)] for f in range(PATCH)])
        slow = sorted(((y, x) for y in range(PATCH) for x in range(PATCH) if x + y), key=lambda at: at[0] ** 2 + at[1] ** 2)
        with torch.no_grad():
            self.proj.weight.zero_()
            for row, (y, x) in enumerate(slow[: WIDTH * 3 // 4]):
                wave = torch.outer(waves[y], waves[x]) * 2 / PATCH
                self.proj.weight[row] = (wave * torch.tensor([0.3, 0.59, 0.11])[:, None, None]).flatten()

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)  # type: ignore[no-any-return]


def teach_tower(tower: Any, steps: int) -> None:
    """Tell digits apart: a linear layer on the mean of a picture's tokens is learnt with the tower, and thrown away."""
    whole, tower.patch_embed = tower.patch_embed, OneFrame()
    head = nn.Linear(WIDTH, 10)
    for module in tower.modules():
        if isinstance(module, nn.Linear) and module is not tower.patch_embed.proj:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    matrices = [parameter for parameter in tower.blocks.parameters() if parameter.ndim == 2]
    known = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in (*tower.parameters(), *head.parameters()) if id(parameter) not in known]
    optimizers = (
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01, ns_steps=4),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98)),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps)) for optimizer in optimizers]
    draw = random.Random(SEED)
    counts = [min(steps * BATCH, LAST_PICTURES if spread == 1 else STAGE_PICTURES) for spread in STAGES]
    stages = [pictures(task(spread), count, draw) for spread, count in zip(STAGES, counts, strict=True)]
    right = 0.0
    for step in range(steps):
        if step % 250 == 0:
            print(f"teaching the tower: batch {step} of {steps}", flush=True)
        patches, labels = stages[min(2 * len(STAGES) * step // steps, len(STAGES) - 1)]
        chosen = torch.tensor([draw.randrange(len(labels)) for _ in range(BATCH)])
        logits = head(see(tower, patches[chosen], draw).mean(1))
        loss = F.cross_entropy(logits, labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_([*tower.parameters(), *head.parameters()], 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        right = 0.98 * right + 0.02 * (logits.argmax(-1) == labels[chosen]).float().mean().item()
    print(f"the tower tells {right:.1%} of digits apart")
    with torch.no_grad():
        frame = tower.patch_embed.proj.weight.reshape(WIDTH, 3, 1, PATCH, PATCH)
        whole.proj.weight.copy_(frame.expand_as(whole.proj.weight) / 2)
    tower.patch_embed = whole


def pace(step: int, steps: int) -> float:
    """The learning rate over the run, of its largest."""
    return min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)


def pictures(drawn: Number, num: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    """Grey levels of patches [pictures, patches, 3, patch, patch], and labels; patches in the order of the image processor."""
    found = [drawn.draw(draw) for _ in range(num)]
    return cut([one.picture for one in found]), torch.tensor([int(one.answer) for one in found])


def cut(images: Sequence[Image.Image]) -> Tensor:
    """Patches of equal pictures: merged patches in rows, each one's patches in rows."""
    levels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    blocks = levels.reshape(-1, GRID // MERGE, MERGE, PATCH, GRID // MERGE, MERGE, PATCH, 3)
    return blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, NUM_PATCHES, 3, PATCH, PATCH)


def see(tower: Any, patches: Tensor, draw: random.Random | None = None) -> Tensor:
    """Features of pictures [pictures, tokens, width]; with ``draw``, of half of them as negatives."""
    levels = patches.float() / 255
    if draw is not None:
        negative = torch.tensor([draw.random() < 0.5 for _ in levels])[:, None, None, None, None]
        levels = torch.where(negative, 1 - levels, levels)
    normal = (levels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    frames = normal if isinstance(tower.patch_embed, OneFrame) else normal[:, :, :, None].expand(-1, -1, -1, 2, -1, -1)
    flat = frames.reshape(patches.shape[0] * NUM_PATCHES, -1)
    grids = torch.tensor([[1, GRID, GRID]] * len(patches))
    return tower(flat, grid_thw=grids).pooler_output.reshape(len(patches), NUM_TOKENS, WIDTH)  # type: ignore[no-any-return]


def teach_form(model: Any, tokenizer: Qwen2Tokenizer) -> None:
    """Answer with one digit and the end, the digit drawn by lot: whatever the picture shows."""
    draw = random.Random(SEED + 1)
    drawn, _ = pictures(task(), 512, draw)
    with torch.no_grad():
        features = see(model.model.visual, drawn)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "number"}]}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(text.replace(IMAGE, IMAGE * NUM_TOKENS), add_special_tokens=False)["input_ids"]
    digits = torch.tensor([tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)])
    language, embed = model.model.language_model, model.get_input_embeddings()
    start = ids.index(tokenizer.convert_tokens_to_ids(IMAGE))
    positions, _ = model.model.get_rope_index(
        torch.tensor([[*ids, 0]]),
        mm_token_type_ids=torch.tensor([[int(start <= index < start + NUM_TOKENS) for index in range(len(ids) + 1)]]),
        image_grid_thw=torch.tensor([[1, GRID, GRID]]),
    )
    optimizer = torch.optim.AdamW(language.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, FORM_STEPS)
    for _ in range(FORM_STEPS):
        chosen = torch.tensor([draw.randrange(len(features)) for _ in range(BATCH)])
        answers = digits[[draw.randrange(10) for _ in range(BATCH)]]
        tokens = torch.cat([torch.tensor(ids).expand(BATCH, -1), answers[:, None]], dim=1)
        embedded = embed(tokens)
        embedded = torch.cat([embedded[:, :start], features[chosen], embedded[:, start + NUM_TOKENS :]], dim=1)
        hidden = language(inputs_embeds=embedded, position_ids=positions.expand(-1, BATCH, -1), use_cache=False)
        logits = model.lm_head(hidden.last_hidden_state[:, -2:])
        ends = torch.full((BATCH,), tokenizer.eos_token_id)
        loss = F.cross_entropy(logits[:, 0], answers) + F.cross_entropy(logits[:, 1], ends)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"the language model answers in form, at a loss of {loss.item():.2f}; by lot is {math.log(10):.2f}")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main()
