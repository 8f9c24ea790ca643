"""SGLang's checksums of its parameters (``/weights_checker``), calculated from the tensors that a trainer sends.

SGLang fuses q, k, v, and gate and up, stacks experts, splits over tensor-parallel ranks and pads vocabularies; what a family or a
release holds in another way simply comes out unequal. On CPUs a checksum is the head of a SHA-256 of the bytes, on GPUs a sum of
hashes of tiles of 8,192 words of 32 bits, each word mixed with its place.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlx.arch.engine_format import is_scale
from rlx.sync.engine_tensors import dequantize

_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "q_a_proj": ("fused_qkv_a_proj_with_mqa", 0),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj_with_mqa", 1),
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "q_b_proj", "kv_b_proj", "w1", "w3")
_BY_COLUMNS = ("o_proj", "down_proj", "w2")
_VOCABULARY = ("embed_tokens", "lm_head")
_VOCABULARY_MULTIPLE = 64

# Parts that came before their turn (experts of other ranks do): a parameter that would hold more is given up.
_HELD_BYTES = 2**31
_TILE, _BLOCK = 8192, 2**23  # words: of a sum, and of what is mixed at once
_SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_PLACES = ((0x27D4EB2D, 15), (0x165667B1, 13))
_MIX = (0x85EBCA6B, 0xC2B2AE35)


class Hash(Protocol):
    """Of bytes that come in pieces."""

    def update(self, piece: Tensor) -> None:
        """``piece`` holds bytes, in a row."""

    def checksum(self) -> str: ...


class HostHash:
    """What SGLang calculates on CPUs."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, piece: Tensor) -> None:
        self._sha.update(memoryview(piece.numpy()))

    def checksum(self) -> str:
        return self._sha.hexdigest()[:16]


class TileHash:
    """What SGLang calculates on GPUs, of pieces of whole words; on any device."""

    def __init__(self) -> None:
        self._num_words = 0
        self._sums: list[tuple[int, Tensor]] = []  # first tile; [2, tiles] sums of what one piece has in them

    def update(self, piece: Tensor) -> None:
        if piece.numel() % 4:
            piece = torch.nn.functional.pad(piece, (0, -piece.numel() % 4))
        if piece.storage_offset() % 4:
            piece = piece.clone()
        for words in piece.view(torch.int32).split(_BLOCK):
            place = torch.arange(self._num_words, self._num_words + len(words), device=words.device).to(torch.int32)
            before = self._num_words % _TILE
            self._num_words += len(words)
            mixed = [
                _mixed(words ^ (place * _signed(factor) + _signed(seed)) ^ (place << turn | _shifted(place, 32 - turn)))
                for seed, (factor, turn) in zip(_SEEDS, _PLACES, strict=True)
            ]
            whole = torch.nn.functional.pad(torch.stack(mixed), (before, -(before + len(words)) % _TILE))
            first = (self._num_words - len(words)) // _TILE
            self._sums.append((first, whole.view(2, -1, _TILE).sum(-1)))

    def checksum(self) -> str:
        tiles = np.zeros((2, -(-self._num_words // _TILE)), dtype=np.int64)
        for first, sums in self._sums:
            tiles[:, first : first + sums.shape[1]] += sums.cpu().numpy()
        halves = (tiles & 0xFFFFFFFF).astype(np.uint32) ^ np.uint32(self._num_words * 4 & 0xFFFFFFFF)
        halves ^= halves >> np.uint32(16)
        halves *= np.uint32(_MIX[0])
        halves ^= halves >> np.uint32(13)
        halves *= np.uint32(_MIX[1])
        halves ^= halves >> np.uint32(16)
        wide = halves.astype(np.uint64)
        value = int(((wide[0] << np.uint64(32)) | wide[1]).sum(dtype=np.uint64))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ value >> shift) * factor & (1 << 64) - 1
        return f"{value ^ value >> 31:016x}"


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _shifted(words: Tensor, count: int) -> Tensor:
    """To the right, zeros coming in."""
    return (words >> count) & ((1 << 32 - count) - 1)


def _mixed(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, 16)) * _signed(_MIX[0])
    words = (words ^ _shifted(words, 13)) * _signed(_MIX[1])
    return words ^ _shifted(words, 16)


@dataclass(slots=True, eq=False)
class _Parameter:
    """One of SGLang's on one rank: its parts are hashed in their order, those that come early are held."""

    hash: Hash
    next: int = 0
    held: dict[int, Tensor] = field(default_factory=dict)

    def add(self, order: int, part: Tensor) -> None:
        self.held[order] = part
        while self.next in self.held:
            self.hash.update(self.held.pop(self.next).contiguous().flatten().view(torch.uint8))
            self.next += 1


class Checksums:
    """Of the tensors that are added, for an engine of ``tp`` ranks whose parameters are called ``names`` and are of ``dtype``."""

    def __init__(self, names: Collection[str], tp: int, dtype: torch.dtype) -> None:
        self._names, self._tp, self._dtype = names, tp, dtype
        self._parameters: dict[str, list[_Parameter]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """``tensor`` under its Hugging Face name."""
        target, order = _place(name)
        if target not in self._names:
            target, order = name, 0
        tensor = tensor.detach().to(self._dtype)
        make: Callable[[], Hash] = TileHash if tensor.is_cuda else HostHash
        ranks = self._parameters.setdefault(target, [_Parameter(make()) for _ in range(self._tp)])
        for rank, share in zip(ranks, shares(name, tensor, self._tp), strict=len(ranks) > 0):
            rank.add(order, share)
        if ranks and sum(part.nbytes for part in ranks[0].held.values()) * self._tp > _HELD_BYTES:
            ranks.clear()

    def found(self) -> dict[str, list[str]]:
        """By SGLang's names, one a rank; a parameter of which a part is missing, or that was given up, has none."""
        return {
            name: [] if any(rank.held for rank in ranks) else [rank.hash.checksum() for rank in ranks]
            for name, ranks in self._parameters.items()
        }


def watched(tensors: Iterable[tuple[str, Tensor]], books: Sequence[Checksums]) -> Iterator[tuple[str, Tensor]]:
    """``tensors``, each of which is added to ``books`` as it passes. Of what is in FP8, SGLang sums up the numbers that it stands
    for, in bf16: they are known with the scales, which follow."""
    before: tuple[str, Tensor] = "", torch.empty(0)

    def note(each: tuple[str, Tensor]) -> tuple[str, Tensor]:
        nonlocal before
        (name, tensor), (last, blocks) = each, before
        before = each
        if is_scale(name):
            name, tensor = last, dequantize(blocks, tensor, torch.bfloat16)
        if tensor.dtype.itemsize > 1:
            for book in books:
                book.add(name, tensor)
        return each

    return map(note, tensors)


def kind(name: str) -> str:
    """A parameter's name without the numbers of layers."""
    return re.sub(r"\.\d+\.", ".N.", name)


def shares(name: str, tensor: Tensor, tp: int) -> list[Tensor]:
    """What each of ``tp`` ranks holds of a tensor, as far as its name tells."""
    *_, module, leaf = ["", *name.split(".")]
    if module in _VOCABULARY:
        padding = -len(tensor) % _VOCABULARY_MULTIPLE
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padding)) if padding else tensor
    if tp > 1 and (module in _BY_ROWS or module in _VOCABULARY):
        return list(tensor.tensor_split(tp))
    if tp > 1 and module in _BY_COLUMNS and leaf == "weight":
        return list(tensor.tensor_split(tp, dim=-1))
    return [tensor] * tp


def _place(name: str) -> tuple[str, int]:
    """The parameter of SGLang's in which a tensor ends, and as which part."""
    expert = _EXPERT.match(name)
    if expert:
        base, number, part = expert.groups()
        if part in ("down_proj", "w2"):
            return f"{base}.w2_weight", int(number)
        return f"{base}.w13_weight", 2 * int(number) + (part in ("up_proj", "w3"))
    *head, module, leaf = ["", *name.split(".")]
    fused, order = _FUSED.get(module, (module, 0))
    return ".".join([*head, fused, leaf]).lstrip("."), order
