"""How large a model is: the shape of every Hugging Face tensor, and parameters by where they live."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlx.arch.architecture import Architecture
from rlx.arch.families.experts import DENSE_ROWS, PROJECTOR_ROWS, TOWER_ROWS, layers_of
from rlx.arch.families.registry import weight_table
from rlx.arch.weights import Row

_MLP, _EXPERT = "decoder.layers.{layer}.mlp.", "{expert}"


def expected_shapes(arch: Architecture) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of the model."""
    return {
        hf_name: shape
        for name, row in weight_table(arch).items()
        for hf_names, shapes in names_of(name, row, arch)
        for hf_name, shape in zip(hf_names, shapes, strict=True)
    }


def names_of(name: str, row: Row, arch: Architecture) -> Iterator[tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]:
    """Names and shapes of the Hugging Face tensors of the row of this Megatron name, for each layer and expert that has it."""
    experts = range(arch.experts.num_experts) if arch.experts is not None and _EXPERT in name else range(1)
    shapes = row.hf_shapes(arch)
    for layer, expert in itertools.product(layers_of(name, arch), experts):
        yield tuple(hf_name.format(layer=layer, expert=expert) for hf_name in row.hf_names), shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCost:
    """What attention between a sequence's tokens costs, counted in tokens: how many of them take as many operations in
    everything else. ``pair`` is the cost of one token seeing one in one layer; ``num_full`` layers see all earlier tokens,
    ``num_windowed`` the last ``window``."""

    pair: float
    num_full: int
    num_windowed: int = 0
    window: int = 1

    def of(self, num_tokens: int) -> float:
        """Of a sequence of so many tokens."""
        seen, within = num_tokens * (num_tokens + 1) / 2, min(num_tokens, self.window)
        seen_in_window = within * (within + 1) / 2 + self.window * (num_tokens - within)
        return self.pair * (self.num_full * seen + self.num_windowed * seen_in_window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Parameters of ``arch`` by where they live: ``embedding`` and ``output`` (the output layer, 0 where it is tied), and of one
    layer ``attention`` (with the norms), ``dense_mlp``, ``moe_mlp`` (all of an MoE layer's but its routed experts) and
    ``experts`` (its routed experts). ``tower`` are those of the whole vision tower, 0 without one,
    ``projector`` those of its part that makes tokens of patches."""

    arch: Architecture
    embedding: int
    output: int
    attention: int
    dense_mlp: int
    moe_mlp: int
    experts: int
    tower: int
    projector: int

    @property
    def num_moe_layers(self) -> int:
        return 0 if self.arch.experts is None else sum(self.arch.experts.layers)

    @property
    def total(self) -> int:
        """All parameters."""
        layers, sparse = self.arch.num_layers, self.num_moe_layers
        body = layers * self.attention + (layers - sparse) * self.dense_mlp + sparse * (self.moe_mlp + self.experts)
        return self.embedding + self.output + body + self.arch.hidden_size + self.tower

    def patch_cost(self, shares: int, *, learns: bool) -> float:
        """How many tokens take as long as the tower's work on a patch, on a rank that has all of the tower and one of ``shares``
        parts of the text model. The tower runs forward, and where it ``learns`` forward again and backward."""
        passes = 4 if learns else 1
        body = (self.total - self.tower - self.embedding) / shares
        return passes * self.tower / (3 * body)

    @property
    def active(self) -> float:
        """Parameters that a token is multiplied by: of the experts those that it is sent to, and the vocabulary's once."""
        layers, sparse, experts = self.arch.num_layers, self.num_moe_layers, self.arch.experts
        share = 0.0 if experts is None else experts.top_k / experts.num_experts
        body = layers * self.attention + (layers - sparse) * self.dense_mlp + sparse * (self.moe_mlp + share * self.experts)
        return body + (self.output or self.embedding)

    @property
    def attention_cost(self) -> AttentionCost:
        """Operations on pairs of tokens as against those on single ones."""
        arch, latent = self.arch, self.arch.latent
        widths = 2 * arch.head_dim if latent is None else latent.plain_dim + latent.rope_dim + latent.value_dim
        windowed = 0 if arch.window is None else sum(arch.windowed_layers) if arch.windowed_layers else arch.num_layers
        return AttentionCost(
            pair=arch.num_heads * widths / self.active,
            num_full=arch.num_layers - windowed,
            num_windowed=windowed,
            window=arch.window or 1,
        )

    @property
    def attention_width(self) -> int:
        """Numbers that a layer's attention keeps of a token for the backward pass: queries, keys, values, what it gives; and with
        norms on queries and keys what these were given."""
        arch, latent = self.arch, self.arch.latent
        if latent is not None:
            return 4 * arch.num_heads * (latent.plain_dim + latent.rope_dim)
        width = 2 * arch.head_dim * (arch.num_heads + arch.num_kv_heads)
        return width + (arch.head_dim * (arch.num_heads + 2 * arch.num_kv_heads) if arch.qk_norm else 0)

    def mlp_width(self, *, one_kernel: bool) -> int:
        """The same of its MLP: both halves of the first product, the activated gate, the other half, and their product (where
        gate and product are ``one_kernel`` only the first and the last of these); of experts also that times the router's weight,
        and each chosen expert's copy of the token twice."""
        experts = self.arch.experts
        if experts is None:
            return (3 if one_kernel and self.arch.gates_in_one_kernel else 5) * self.arch.ffn_hidden_size
        routed = experts.top_k * (6 * experts.hidden_size + 2 * self.arch.hidden_size)
        return routed + 5 * experts.shared_hidden_size


def sizes_of(arch: Architecture) -> Sizes:
    """Counted from the weight table."""
    count = dict.fromkeys(("embedding", "output", "attention", "dense_mlp", "moe_mlp", "experts", "tower", "projector"), 0)
    for name, row in weight_table(arch).items():
        if "{layer}" not in name and not name.startswith(("embedding.", "output_layer.", TOWER_ROWS)):
            continue  # the last norm, which ``total`` adds
        blocks = len(layers_of(name, arch)) if name.startswith(TOWER_ROWS) else 1
        size = blocks * sum(math.prod(shape) for shape in row.hf_shapes(arch))
        count[_place(name)] += size
        count["projector"] += size if name.startswith(PROJECTOR_ROWS) else 0
    if arch.experts is not None:
        count["experts"] *= arch.experts.num_experts
    return Sizes(arch=arch, **count)


def _place(name: str) -> str:
    if name.startswith(TOWER_ROWS):
        return "tower"
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "output"
    if name.startswith(DENSE_ROWS):
        return "dense_mlp"
    if name.startswith(_MLP):
        return "experts" if _EXPERT in name else "moe_mlp"
    return "attention"
