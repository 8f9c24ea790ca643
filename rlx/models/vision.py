"""The vision tower: transformers' own module on the chunk that has the embedding, and images' features in their places.

Every tensor-parallel and context-parallel rank of the first stage holds the whole tower and computes the images that its own
tokens stand for, so that its gradient is that part: data parallelism adds up over context parallelism, Megatron over tensor
parallelism for parameters marked ``sequence_parallel``; without sequence parallelism every rank has the whole gradient. Features
are placed by span, never by token id. Legend: T tokens of a pack, t of this rank, N patches, H heads, K head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from rlx.arch.architecture import Architecture
from rlx.arch.vision import Vision
from rlx.data.images.grid import num_image_tokens
from rlx.data.images.pixels import pixels
from rlx.parallel.context import ParallelContext
from rlx.parallel.packing import LocalBatch
from rlx.types.rollout import ImageSpan

Files = Callable[[str], Path]
_PROJECTOR = "merger."
# transformers calls an attention whose name has "flash" in it once a block, with the borders of the windows.
_ATTENTION = "flash_over_windows"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TowerImages:
    """Where a chunk with a tower finds its images, and which part of a pack's tokens it embeds. ``files`` gives the canonical
    file of a key."""

    vision: Vision
    files: Files | None
    device: torch.device
    has_gradient: bool
    parts: int
    part: int

    def mine(self, column_t: Tensor) -> Tensor:
        """What of this rank's tokens the embedding gives: a slice of them under sequence parallelism."""
        return column_t.chunk(self.parts)[self.part]


def add_tower(
    model: nn.Module, arch: Architecture, context: ParallelContext, dtype: torch.dtype, learns: str, files: Files | None
) -> None:
    """Put the tower of ``arch`` on a chunk, its weights unset; ``learns`` is one of ``LEARNING``."""
    vision, dims = arch.vision, context.dims
    assert vision is not None
    tower = _tower(arch, vision, context.device, dtype)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(learns == "train" or (learns == "projector" and name.startswith(_PROJECTOR)))
        parameter.sequence_parallel = dims.sequence_parallel
        parameter.of_vision_tower = True
    if learns == "train":
        tower.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.vision = tower
    model.image_reader = TowerImages(  # type: ignore[assignment]
        vision=vision,
        files=files,
        device=context.device,
        has_gradient=learns != "frozen",
        parts=dims.tp if dims.sequence_parallel else 1,
        part=context.tp_rank if dims.sequence_parallel else 0,
    )


def embedded(model: nn.Module, batch: LocalBatch) -> Tensor | None:
    """The embeddings of this rank's tokens with the images' features in their places, [t, 1, D] (a slice of them under sequence
    parallelism). None where the model embeds by itself: without images, or on a chunk without an embedding."""
    reader: Any = getattr(model, "image_reader", None)
    if reader is None or not batch.pack.images:
        return None
    embeddings: Tensor = model.embedding(input_ids=batch.tokens_1t, position_ids=batch.positions_1t)  # type: ignore[operator]
    index_t = reader.mine(batch.index_t).cpu()
    spans, image_T, place_T = _places(batch.pack.images, batch.pack.tokens_T.shape[0], reader.vision.merge)
    image_t = image_T[index_t]
    here = (image_t >= 0).nonzero()[:, 0]
    wanted, image_here = image_t[here].unique(return_inverse=True)
    if not len(wanted):
        return embeddings
    chosen = [spans[number] for number in wanted.tolist()]
    firsts = np.cumsum([0, *(num_image_tokens(span.grid, reader.vision.merge) for span in chosen)])
    rows = torch.from_numpy(firsts)[image_here] + place_T[index_t[here]]
    if reader.has_gradient:
        features = _features(model.vision, chosen, reader)
    else:
        features = _constant_features(model.vision, chosen, reader, batch.pack.kept_features)
    placed = features[rows.to(reader.device)].to(embeddings.dtype)
    return embeddings.index_put((here.to(reader.device),), placed[:, None])


@torch.no_grad()
def _constant_features(
    tower: Any, spans: Sequence[ImageSpan], reader: TowerImages, kept: dict[tuple[int, str], Tensor]
) -> Tensor:
    """The same of a tower that does not learn, whose features are made once a batch: for scores and for every update."""
    missing = [span for span in spans if (id(tower), span.key) not in kept]
    if missing:
        counts = [num_image_tokens(span.grid, reader.vision.merge) for span in missing]
        made = _features(tower, missing, reader).cpu().split(counts)
        kept |= {(id(tower), span.key): features.clone() for span, features in zip(missing, made, strict=True)}
    return torch.cat([kept[id(tower), span.key] for span in spans]).to(reader.device)


def _features(tower: Any, spans: Sequence[ImageSpan], reader: TowerImages) -> Tensor:
    """One row a placeholder, image by image."""
    if reader.files is None:
        raise ValueError("there are images in the batch, but this model was told of no files")
    patches = np.concatenate([pixels(reader.files(span.key), span, reader.vision) for span in spans])
    grids = torch.tensor([span.grid for span in spans], device=reader.device)
    features: Tensor = tower(torch.from_numpy(patches).to(reader.device), grid_thw=grids).pooler_output
    return features


def _places(images: Sequence[ImageSpan], num_tokens: int, merge: int) -> tuple[list[ImageSpan], Tensor, Tensor]:
    """The images of a pack, each once however often it stands there; and of every token which of them it is part of (-1: of none)
    and which of its tokens, [T]."""
    numbers: dict[str, int] = {}
    spans: list[ImageSpan] = []
    image_T, place_T = torch.full((num_tokens,), -1), torch.zeros(num_tokens, dtype=torch.int64)
    for span in images:
        if span.key not in numbers:
            numbers[span.key] = len(spans)
            spans.append(span)
        count = num_image_tokens(span.grid, merge)
        image_T[span.start : span.start + count] = numbers[span.key]
        place_T[span.start : span.start + count] = torch.arange(count)
    return spans, image_T, place_T


def _tower(arch: Architecture, vision: Vision, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' module, in memory that nothing was written to but its rotary frequencies."""
    make = _module_of(arch, vision)
    with torch.device("meta"):
        tower = make().to(dtype)
    tower.config._attn_implementation = _ATTENTION
    tower = tower.to_empty(device=device)
    # A patch at a time, the convolution is a product of matrices, which no convolution kernel needs to be found for.
    tower.patch_embed.forward = partial(_embed_patches, tower.patch_embed.proj)
    rotary = tower.rotary_pos_emb
    exponents = torch.arange(0, rotary.dim, 2, dtype=torch.float, device="cpu") / rotary.dim
    rotary.inv_freq = (1.0 / (rotary.theta**exponents)).to(device)
    return tower


def _embed_patches(proj: nn.Conv3d, patches: Tensor) -> Tensor:
    """[N, numbers of a patch] -> [N, width of the tower]."""
    return F.linear(patches.to(proj.weight.dtype), proj.weight.flatten(1))


def _module_of(arch: Architecture, vision: Vision) -> Any:
    from transformers import AttentionInterface
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as windowed
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_vl import modeling_qwen2_vl as plain
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    AttentionInterface.register(_ATTENTION, attend)
    sizes: dict[str, Any] = {
        "depth": vision.depth,
        "num_heads": vision.num_heads,
        "hidden_act": vision.activation,
        "patch_size": vision.patch,
        "spatial_merge_size": vision.merge,
        "temporal_patch_size": vision.temporal,
    }
    config: Any
    if vision.window is None:
        ratio = vision.mlp_size // vision.hidden_size
        config = Qwen2VLVisionConfig(embed_dim=vision.hidden_size, hidden_size=arch.hidden_size, mlp_ratio=ratio, **sizes)
        return partial(plain.Qwen2VisionTransformerPretrainedModel, config)
    config = Qwen2_5_VLVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.mlp_size,
        out_hidden_size=arch.hidden_size,
        window_size=vision.window,
        fullatt_block_indexes=list(vision.full_blocks),
        **sizes,
    )
    return partial(windowed.Qwen2_5_VisionTransformerPretrainedModel, config)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """[1, H, N, K] each -> [1, N, H, K]: attention within the borders ``cu_seq_lens_q``, in one kernel on GPUs; elsewhere, in
    fp32 and with heads that the kernel does not know, windows of equal size in one batch."""
    borders, scale = options["cu_seq_lens_q"], options["scaling"]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0:
        longest = _longest(borders)
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        attended = varlen_attn(query, key, value, borders, borders, longest, longest, scale=scale)
        assert isinstance(attended, Tensor)  # a pair only when it is asked for
        return attended[None], None
    extents = borders[1:] - borders[:-1]
    output = torch.zeros_like(query)
    for extent in extents.unique().tolist():
        rows = borders[:-1][extents == extent].long()[:, None] + torch.arange(extent, device=borders.device)
        q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))
        output = output.index_put((rows,), F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2))
    return output[None], None


def _longest(borders: Tensor) -> int:
    """The largest extent; asked of the device once for all blocks that share these borders."""
    if not hasattr(borders, "longest"):
        borders.longest = int((borders[1:] - borders[:-1]).max())  # type: ignore[attr-defined]
    return int(borders.longest)  # type: ignore[attr-defined]
