"""What the engine works on: one prompt with its sampling and the answer as far as it has got."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rlx.rollout.embedded.images import Picture, Shown

FinishReason = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Checked sampling settings of one sequence. ``temperature`` 0 is greedy, ``top_k`` -1 is off.

    ``stop_ids`` already holds the model's own end tokens, or nothing at all under ``ignore_eos`` (as in SGLang).
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_ids: frozenset[int]
    seed: int


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One answer in the making. Written by the worker thread only, until ``finish`` or ``error`` is set.

    output_ids, output_logprobs   the tokens made so far, stop token included, and log_softmax(logits / temperature) of each
    logprob_start                 None, or the first prompt token to report in ``input_logprobs``
    input_logprobs                [len(prompt) - 1 - logprob_start] raw log-probs of the prompt's tokens after that one
    pictures                      the images of the prompt
    weight_versions               (version, end) of each stretch of the output that one version of the weights wrote
    scores                        a reward model's, one a label
    """

    rid: str
    prompt: list[int]
    params: SamplingParams
    return_logprob: bool
    logprob_start: int | None = None
    pictures: tuple[Picture, ...] = ()
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    input_logprobs: list[float] | None = None
    scores: list[float] | None = None
    num_retractions: int = 0
    finish: FinishReason | None = None
    error: str | None = None
    weight_versions: list[tuple[str, int]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def needs_scoring(self) -> bool:
        return self.logprob_start is not None and self.input_logprobs is None

    def tokens(self) -> list[int]:
        """Everything the model must have seen before the next token."""
        return self.prompt + self.output_ids if self.output_ids else self.prompt

    def shown(self) -> Shown:
        """The same with the images of the prompt."""
        return Shown(self.tokens(), self.pictures)

    def add(self, token: int, logprob: float) -> None:
        """Take one more token and decide whether the answer ends with it. Length comes before stop, as in SGLang."""
        self.output_ids.append(token)
        self.output_logprobs.append(logprob)
        if len(self.output_ids) >= self.params.max_new_tokens:
            self.end_by_length()
        elif token in self.params.stop_ids:
            self.finish = {"type": "stop", "matched": token}

    def label(self, version: str) -> None:
        """Say which weights wrote the tokens since the last call."""
        end = len(self.output_ids)
        if self.weight_versions and self.weight_versions[-1][1] == end:
            return
        if self.weight_versions and self.weight_versions[-1][0] == version:
            self.weight_versions.pop()
        self.weight_versions.append((version, end))

    def end_by_length(self) -> None:
        self.finish = {"type": "length", "length": len(self.output_ids)}

    def abort(self, message: str = "Aborted") -> None:
        self.finish = {"type": "abort", "message": message, "status_code": None, "err_type": None}
