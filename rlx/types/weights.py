"""Weights on their way from trainers to engines, and how they arrived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


def torch_dtype(name: str) -> torch.dtype:
    """The type that torch calls so."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype), name
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor under its Hugging Face name. ``dtype`` is spelt as in safetensors-free text: "float32", "bfloat16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        size = torch_dtype(self.dtype).itemsize
        for extent in self.shape:
            size *= extent
        return int(size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightChunk:
    """Tensors that travel in one request: as they are, or flattened into one byte buffer (``flattened``)."""

    infos: tuple[TensorInfo, ...]
    tensors: tuple[Tensor, ...]
    flattened: bool

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos)


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryReport:
    """How far the engines' scores were from the trainer's after a publication that passed.

    ``difference`` is the mean |difference| of log-probs in nats, of the engine that is farthest. ``doubts`` has a sentence
    for each engine that was farther than the tolerance although no tensor differs. ``num_proved`` parameters of every engine
    have the checksums that the trainer calculated (0 where engines give none).
    """

    difference: float
    num_proved: int = 0
    doubts: tuple[str, ...] = ()


_PROOF_PHASES = ("checksums", "canary", "second canary", "search")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """What one publication of weights delivered, each tensor once; not those that engines hold and that never change. ``canary``
    is None where none was due."""

    version: int
    tensors: tuple[TensorInfo, ...]
    num_bytes: int
    seconds: float
    phase_s: Mapping[str, float] = field(default_factory=dict)
    canary: CanaryReport | None = None

    @property
    def unproved_s(self) -> float:
        """From pause to continue, without what the verification took."""
        return self.seconds - sum(self.phase_s.get(name, 0.0) for name in _PROOF_PHASES)
