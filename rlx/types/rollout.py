"""Prompts, answers, rewards and what a step reports. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelUse:
    """What a reward does with labels: ``is_needed``: no verdict without one; ``is_compared``: as text; ``is_handed_on``: as
    it is, to a function of the user's."""

    is_needed: bool = False
    is_compared: bool = False
    is_handed_on: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question. ``prompt_id`` numbers the prompts of a run in the order drawn; ``extra`` holds the row's other columns.

    ``label`` is text where the row holds text or a number, None where it holds nothing, else what the row holds.
    """

    prompt_id: int
    token_ids: tuple[int, ...]
    text: str
    label: object = None
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

    @property
    def is_cut_off(self) -> bool:
        """Whether the length limit ended it."""
        return self.finish_reason == "length"


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
