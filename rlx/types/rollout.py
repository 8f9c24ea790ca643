"""Prompts, trajectories, rewards and what a step reports. Knows no torch.

Numbers that come one a token are ``array``s: int32 ids and versions, float64 log-probs (as engines say them), int8 masks.

Shape legend: L tokens of a segment, a trajectory or a sample.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]
# What ``Trajectory.weight_versions`` says of a token that no weights wrote.
NO_VERSION = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelUse:
    """What a reward does with labels: ``is_needed``: no verdict without one; ``is_compared``: as text; ``is_handed_on``: as
    it is, to a function of the user's."""

    is_needed: bool = False
    is_compared: bool = False
    is_handed_on: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpan:
    """Where an image stands among token ids: at ``start`` begins its run of placeholders.

    ``key`` is the SHA-256 of the image's canonical file, in hexadecimal. ``grid`` counts its patches: along time, down, across
    (a still image has 1 along time). The run has one token for each merged patch: with a merge of 2 by 2, an image with the grid
    (1, 4, 6) has 6. Only a span makes tokens an image: the same ids elsewhere are text, whoever wrote them.
    """

    key: str
    start: int
    grid: tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question. ``prompt_id`` numbers the prompts of a run in the order drawn; ``extra`` holds the row's other columns.

    ``label`` is text where the row holds text or a number, None where it holds nothing, else what the row holds. ``messages``
    are those of a chat, empty where the row holds a text; ``text`` is what the template made of them. ``images`` stand in
    ``token_ids``, in order.
    """

    prompt_id: int
    token_ids: tuple[int, ...]
    text: str
    messages: tuple[Mapping[str, object], ...] = ()
    label: object = None
    source: str = ""
    images: tuple[ImageSpan, ...] = ()
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
class Segment:
    """Tokens that came at once: sampled by an engine under one version of the weights, or given (a prompt, what a tool said).

    ``token_ids`` int32 [L]; ``rollout_logprobs`` float64 [L] of sampled tokens are the engine's (after temperature, before
    top-p/top-k), of given ones there are none. Raises ValueError where they do not fit together.
    """

    token_ids: array[int]
    rollout_logprobs: array[float] = field(default_factory=lambda: array("d"))
    weight_version: int | None = None

    def __post_init__(self) -> None:
        wanted = len(self.token_ids) if self.is_sampled else 0
        if len(self.rollout_logprobs) != wanted:
            kind = "sampled" if self.is_sampled else "given"
            raise ValueError(f"{len(self.token_ids)} {kind} tokens but {len(self.rollout_logprobs)} log-probs")

    @property
    def is_sampled(self) -> bool:
        """Whether a policy wrote it, and can learn from it."""
        return self.weight_version is not None

    def __len__(self) -> int:
        return len(self.token_ids)


def given(token_ids: Iterable[int]) -> Segment:
    """Tokens that no policy wrote, as a segment."""
    return Segment(token_ids=array("i", token_ids))


def sampled(token_ids: Sequence[int], rollout_logprobs: Sequence[float], weight_versions: Sequence[int]) -> tuple[Segment, ...]:
    """One answer of an engine as segments, one for each stretch that the same weights wrote (so mostly one; none if empty)."""
    if not len(token_ids) == len(rollout_logprobs) == len(weight_versions):
        lengths = f"{len(token_ids)}, {len(rollout_logprobs)}, {len(weight_versions)}"
        raise ValueError(f"token_ids, rollout_logprobs and weight_versions have lengths {lengths}")
    segments, start = [], 0
    for version, stretch in groupby(weight_versions):
        end = start + sum(1 for _ in stretch)
        ids, logprobs = array("i", token_ids[start:end]), array("d", rollout_logprobs[start:end])
        segments.append(Segment(token_ids=ids, rollout_logprobs=logprobs, weight_version=version))
        start = end
    return tuple(segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """All tokens of one sample, in order, and how it ended. Nothing but the mask tells prompt from answer.

    A single turn: ``segments=(given((1, 2)), *sampled((7, 8), (-0.5, -0.1), (3, 3)))`` has ``token_ids`` 1 2 7 8,
    ``loss_mask`` 0 0 1 1, ``rollout_logprobs`` 0 0 -0.5 -0.1, ``weight_versions`` -1 -1 3 3 and one turn, 7 8. A further turn
    appends a given segment and a sampled one.

    ``images`` stand in ``token_ids``: those of the prompt first. ``finish_reason`` is that of the last turn. ``messages`` is the
    conversation after the prompt where an environment had one; empty: the one turn is the answer. ``reward_parts`` are what the
    environment gave on the way, by name.
    """

    segments: tuple[Segment, ...]
    finish_reason: FinishReason
    messages: tuple[Mapping[str, object], ...] = ()
    images: tuple[ImageSpan, ...] = ()
    reward_parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def token_ids(self) -> array[int]:
        """int32 [L]."""
        return _joined("i", (segment.token_ids for segment in self.segments))

    @property
    def loss_mask(self) -> array[int]:
        """int8 [L]: 1 on sampled tokens, 0 on given ones."""
        return _joined("b", (array("b", (segment.is_sampled,)) * len(segment) for segment in self.segments))

    @property
    def rollout_logprobs(self) -> array[float]:
        """float64 [L]: 0 on given tokens."""
        nothing = array("d", (0.0,))
        parts = (segment.rollout_logprobs if segment.is_sampled else nothing * len(segment) for segment in self.segments)
        return _joined("d", parts)

    @property
    def weight_versions(self) -> array[int]:
        """int32 [L]: the weights that wrote each token, ``NO_VERSION`` on given ones."""
        versions = ((NO_VERSION if s.weight_version is None else s.weight_version, len(s)) for s in self.segments)
        return _joined("i", (array("i", (version,)) * size for version, size in versions))

    @property
    def turns(self) -> tuple[array[int], ...]:
        """The sampled ids of each turn: of sampled segments with none but sampled ones between them."""
        runs = groupby((segment for segment in self.segments if len(segment)), key=lambda segment: segment.is_sampled)
        return tuple(_joined("i", (segment.token_ids for segment in run)) for is_sampled, run in runs if is_sampled)

    @property
    def num_tokens(self) -> int:
        """L."""
        return sum(len(segment) for segment in self.segments)

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy wrote."""
        return sum(len(segment) for segment in self.segments if segment.is_sampled)

    @property
    def oldest_version(self) -> int:
        """The oldest weights that wrote a token; 0 without any."""
        return min((s.weight_version for s in self.segments if s.weight_version is not None), default=0)

    @property
    def is_cut_off(self) -> bool:
        """Whether the length limit ended it."""
        return self.finish_reason == "length"


def _joined[Number: (int, float)](typecode: str, parts: Iterable[array[Number]]) -> array[Number]:
    whole: array[Number] = array(typecode)
    for part in parts:
        whole.extend(part)
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A verdict. ``valid`` is False when the verifier itself failed; ``error`` then says how, and ``value`` means nothing."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    valid: bool = True
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All trajectories of one prompt, with their rewards once scored (same order). Each begins with the prompt as one segment."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    rewards: tuple[Reward, ...] | None = None


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
