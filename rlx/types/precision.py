"""What the setting ``dtype`` stands for: the one place that knows the number formats of weights. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

GRADIENT_BYTES = 4
"""Of a main gradient: gradients are summed in fp32 whatever the weights are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The number format of a model's weights and activations, and what follows from it.

    name              as configurations and commands spell it
    torch_name        as torch and SGLang spell it
    weight_bytes      of one weight
    optimizer_bytes   of what AdamW keeps of one weight: two moments in fp32, and fp32 masters of weights that are not
    canary_tolerance  mean |log-prob| difference between trainer and engine beyond which tensors are compared
    canary_limit      the one beyond which no rounding is believed, whatever multiple of the tolerance it is
    fp32_head         logits are kept in fp32 though the output layer's weights are not

    >>> precision_of("bf16", fp32_head=True).torch_name
    'bfloat16'
    """

    name: str
    torch_name: str
    weight_bytes: int
    optimizer_bytes: int
    canary_tolerance: float
    canary_limit: float = math.inf
    fp32_head: bool = False


FP32 = Precision(name="fp32", torch_name="float32", weight_bytes=4, optimizer_bytes=8, canary_tolerance=1e-3)
BF16 = Precision(name="bf16", torch_name="bfloat16", weight_bytes=2, optimizer_bytes=12, canary_tolerance=0.1)
PRECISIONS: Mapping[str, Precision] = {each.name: each for each in (FP32, BF16)}


def precision_of(name: str, *, fp32_head: bool = False) -> Precision:
    """The precision of a ``dtype``; ``fp32_head`` says nothing new of one that is fp32 throughout."""
    found = PRECISIONS[name]
    return replace(found, fp32_head=fp32_head and found is not FP32)


def in_fp8(engines: Precision) -> Precision:
    """That of engines which compute products of FP8 numbers and everything else as before.

    Weights and activations keep three bits of a number's fraction. With both rounded so (transformers, SmolLM2-135M-Instruct),
    log-probs of random tokens, the canary's, are 0.45 to 0.61 nats off in the mean; garbage is off by several.
    """
    return replace(engines, canary_tolerance=0.75, canary_limit=1.5)
