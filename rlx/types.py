"""The vocabulary: every value that crosses a package border, and nothing else.

This file knows no Megatron, no SGLang and no files. Shape legend, used in every docstring and name:

    T  packed tokens of one micro-batch (sequences laid end to end)
    S  sequences in one micro-batch
    L  tokens of one sample (prompt + response)
    V  vocabulary entries

Token columns have two alignments. *Token-aligned* columns of a sample (length L) say something about token i
itself. *Position-aligned* columns (names in a ``MicroBatch`` and in ``LossInputs``) say something about the
prediction made AT position t, that is, about token t + 1. ``rlx.data.collate`` is the one place that shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelDims:
    """How a world of ranks is cut. Raises ValueError at birth if the numbers do not fit together.

    Example: ``ParallelDims(world_size=8, tp=2, pp=2)`` has ``dp == 2``.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """Everything that is wrong with the layout, in words; empty when it fits."""
        sizes = {"world_size": self.world_size, "tp": self.tp, "pp": self.pp, "vpp": self.vpp, "cp": self.cp, "ep": self.ep}
        found = [f"parallel.{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]
        if found:
            return found
        block = self.tp * self.pp * self.cp
        if self.world_size % block:
            found.append(
                f"tp x pp x cp = {self.tp} x {self.pp} x {self.cp} = {block} does not divide the {self.world_size} trainer ranks"
            )
        expert_block = self.expert_tp * self.ep * self.pp
        if self.world_size % expert_block:
            found.append(
                f"etp x ep x pp = {self.expert_tp} x {self.ep} x {self.pp} = {expert_block}"
                f" does not divide the {self.world_size} trainer ranks"
            )
        if self.vpp > 1 and self.pp == 1:
            found.append("parallel.vpp > 1 needs parallel.pp > 1")
        if self.sequence_parallel and self.tp == 1:
            found.append("parallel.sequence_parallel needs parallel.tp > 1")
        return found

    @property
    def dp(self) -> int:
        """Data-parallel size (context parallelism not included)."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size inside the experts: ``etp``, or ``tp`` when it is not given."""
        return self.tp if self.etp is None else self.etp

    @property
    def sequence_multiple(self) -> int:
        """Each packed sequence is padded to a multiple of this (zigzag context parallelism cuts it in 2 x cp chunks)."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """The whole pack is padded to a multiple of this (sequence parallelism splits it over tp as well)."""
        return self.sequence_multiple * (self.tp if self.sequence_parallel else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question. ``prompt_id`` numbers the prompts of a run in the order drawn; ``extra`` holds the row's other columns."""

    prompt_id: int
    token_ids: tuple[int, ...]
    text: str
    label: str | None = None
    source: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSpec:
    """How to sample. ``temperature`` 0 is greedy; ``top_k`` -1 is off. ``seed`` fixes the draws where the engine can."""

    num_samples: int = 1
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer of an engine: response tokens only, stop token included.

    ``rollout_logprobs`` [len(token_ids)] are the engine's (after temperature, before top-p/top-k);
    ``weight_versions`` [len(token_ids)] say which weights wrote each token.
    """

    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_versions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A verdict. ``valid`` is False when the verifier itself failed; ``error`` then says how, and ``value`` means nothing."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    valid: bool = True
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All answers to one prompt, with their rewards once scored (same order)."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSample:
    """One sequence to train on. All columns are token-aligned and have length L = prompt + response.

    ``loss_mask`` is 1 on response tokens; ``rollout_logprobs`` is 0 on prompt tokens. ``scalar_advantage`` is
    the group-relative advantage of the whole response, or None when advantages come from a critic.
    """

    sample_id: int
    group_id: int
    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    reward: float
    scalar_advantage: float | None = None
    weight_version: int = 0

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatchPlan:
    """One optimizer step. ``micro_batches[dp_rank][i]`` are sample indices; every rank has the same number of them.

    A micro-batch may be empty on a rank (fewer samples than ranks): it is run as one masked-out padding sequence,
    so that collectives stay in step. ``num_loss_tokens`` and ``num_sequences`` count the whole mini-batch over all ranks.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    num_loss_tokens: int
    num_sequences: int

    @property
    def num_micro_batches(self) -> int:
        return len(self.micro_batches[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How one rollout batch is cut: mini-batches (one optimizer step each), data-parallel ranks, micro-batches."""

    mini_batches: tuple[MiniBatchPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Packed sequences of one forward pass, before the context-parallel split. Position-aligned columns.

    tokens_T, labels_T   int64; ``labels_T[t]`` is the token predicted at t (0 where there is none)
    loss_mask_T          float32; 1 where the predicted token is a response token
    cu_seqlens_S1        int32 [S + 1]; borders of the sequences, padding of each counted to it
    lengths_S            int64 [S]; true lengths, without padding
    sample_ids           the samples in order; padding sequences have id -1
    columns              more float32 [T] columns by name: rollout_logprobs, old_logprobs, advantages, ...
    """

    tokens_T: Tensor
    labels_T: Tensor
    loss_mask_T: Tensor
    cu_seqlens_S1: Tensor
    lengths_S: Tensor
    sample_ids: tuple[int, ...]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def max_seqlen(self) -> int:
        return int((self.cu_seqlens_S1[1:] - self.cu_seqlens_S1[:-1]).max())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """What a loss may look at, position-aligned, for the tokens this rank holds (float32 [T]).

    ``logprobs_T`` / ``entropy_T`` / ``values_T`` carry gradients; everything else is data. Columns a loss does not
    use may be None. ``weights_T`` is what each token counts for in the sum (0 off the response); the division by the
    mini-batch's global count happens outside, once. ``importance_T`` (1 where None) scales the policy term alone.

    ``sequence_T`` (int64) numbers each token's sequence in the micro-batch, 0 to ``num_sequences`` - 1. Context parallelism
    spreads a sequence over ranks; ``sum_over_ranks`` adds a tensor up over them, with gradient (None: one rank has all).
    """

    weights_T: Tensor
    importance_T: Tensor | None = None
    sequence_T: Tensor | None = None
    num_sequences: int = 0
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    logprobs_T: Tensor | None = None
    entropy_T: Tensor | None = None
    values_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    rollout_logprobs_T: Tensor | None = None
    advantages_T: Tensor | None = None
    old_values_T: Tensor | None = None
    returns_T: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossOutput:
    """``loss`` is a SUM over tokens (0-dim, with gradient). ``stats`` are sums and counts [2], so that reducing them
    over ranks and micro-batches is always a sum; the reported value is sum / count."""

    loss: Tensor
    stats: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor under its Hugging Face name. ``dtype`` is spelt as in safetensors-free text: "float32", "bfloat16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        size = getattr(torch, self.dtype).itemsize
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
    for each engine that was farther than the tolerance although no tensor differs.
    """

    difference: float
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """What one publication of weights delivered: every tensor once. ``canary`` is None where none was due."""

    version: int
    tensors: tuple[TensorInfo, ...]
    num_bytes: int
    seconds: float
    phase_s: Mapping[str, float] = field(default_factory=dict)
    canary: CanaryReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """One optimizer step. ``means`` are token means over the whole mini-batch; ``skipped`` when gradients overflowed."""

    grad_norm: float
    learning_rate: float
    skipped: bool
    means: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One row of ``metrics.jsonl``: flat keys, finite numbers."""

    step: int
    metrics: Mapping[str, float]
